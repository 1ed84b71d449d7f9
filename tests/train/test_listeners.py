"""What follows a step: the balance bias, the metrics line, the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.train.best import Best, BestConfig, Mode
from cantata.train.expert_counts import ExpertInterval
from cantata.train.listeners import Codebook, ExpertBias, Saving, Telemetry
from cantata.train.loop import Progress
from cantata.train.window import Window
from tests.models.aria.small import small_aria, small_layout
from tests.nn.moe.small import balance
from tests.train.test_window import CPU, result


class Console:
    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.saved: list[int] = []
        self.warned: list[str] = []

    def on_warning(self, text: str) -> None:
        self.warned.append(text)

    def on_log(self, record: Mapping[str, Any]) -> None:
        self.logged.append(record)

    def on_checkpoint(self, step: int, path: Path) -> None:
        assert path == Path(f"step-{step}")
        self.saved.append(step)


class Sink(list[Any]):
    write = list.append


def telemetry(log_every: int, max_steps: int, sink: Sink) -> Telemetry:
    settings = {"base_learning_rate": 0.3, "log_every": log_every, "max_steps": max_steps}
    return Telemetry(Window(CPU), sink, Console(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("log_every", "max_steps", "expected"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 2, [2])]
)
def test_lines_come_every_so_many_steps_and_after_the_last(
    log_every: int, max_steps: int, expected: list[int]
) -> None:
    sink = Sink()
    listener = telemetry(log_every, max_steps, sink)
    for step in range(1, max_steps + 1):
        listener.after_step(result(step))
    assert [record["step"] for record in sink] == expected
    assert listener.last_loss == sink[-1]["loss"]


def test_what_another_listener_adds_forces_a_line() -> None:
    sink = Sink()
    listener = telemetry(10, 20, sink)
    listener.after_step(result(1))
    listener.after_step(replace(result(2), extra={"eval/loss": 0.25}))
    listener.after_step(result(3))
    assert [(record["step"], record["eval/loss"]) for record in sink] == [(2, 0.25)]
    assert sink[0]["step_seconds"] == 3.0, "the line speaks for both steps since the last"


def test_a_codebook_learns_from_its_own_sums_of_each_step() -> None:
    given: list[Mapping[str, torch.Tensor]] = []
    quantizer: Any = SimpleNamespace(update=given.append)
    sums = {"loss_sum": torch.ones(()), "usage": torch.ones(3), "statistics/ema/rows_K": torch.arange(3)}
    listener = Codebook(quantizer)
    listener.after_step(replace(result(1), sums=sums))
    listener.after_step(replace(result(2), sums={"loss_sum": torch.ones(())}))
    assert [list(statistics) for statistics in given] == [["ema/rows_K"], []]
    assert torch.equal(given[0]["ema/rows_K"], torch.arange(3))


def test_biases_move_against_the_load() -> None:
    model = small_aria(small_layout(moe={"balance": balance(4, bias=0.01)}))
    layers = model.moe_layers()
    counts_LME = torch.zeros(2, 3, 4, dtype=torch.float64)
    counts_LME[0, 0], counts_LME[0, 1] = torch.tensor([9.0, 1, 5, 1]), torch.tensor([0.0, 0, 1, 3])
    counts_LME[1, 2] = torch.tensor([1.0, 2, 3, 4])
    finished = replace(result(1), sums={"tokens_per_expert_LME": counts_LME})
    ExpertBias(layers, model.balance).after_step(finished)
    # Layer 0 counted over modalities: 9, 1, 6, 4 with a mean of 5.
    torch.testing.assert_close(layers[0].router.expert_bias_E, torch.tensor([-0.01, 0.01, -0.01, 0.01]))
    torch.testing.assert_close(layers[1].router.expert_bias_E, torch.tensor([0.01, 0.01, -0.01, -0.01]))


def test_routers_without_a_bias_are_left_alone() -> None:
    model = small_aria(small_layout())
    for balance_of in (model.balance, None):
        ExpertBias(model.moe_layers(), balance_of).after_step(replace(result(1), sums={}))


BEST = BestConfig("eval/loss", Mode.min)


class Loader:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"rows": 0, "order": {"seed": 7}, "streams": {}}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


class Checkpointer:
    """Keeps documents instead of files; `is_saved` is what a background save says of itself."""

    def __init__(self, every: int = 0, in_background: bool = False) -> None:
        self.every = every
        self.in_background = in_background
        self.documents: dict[int, dict[str, Any]] = {}
        self.best: int | None = None
        self.is_saved = True

    def path(self, step: int) -> Path:
        return Path(f"step-{step}")

    def resume_from(self, warn: Callable[[str], None]) -> Path | None:
        warn("one is damaged")
        return self.path(max(self.documents)) if self.documents else None

    def keep_best(self, step: int) -> bool:
        return step in self.documents

    def save(self, step: int, engine: Any, loader_state: Any, extra: Any, *, best: bool = False) -> bool:
        self.wait()
        if step in self.documents:
            return False
        self.documents[step] = {"loader": loader_state, "extra": extra}
        self.best = step if best else self.best
        self.is_saved = not self.in_background
        return True

    def wait(self) -> None:
        self.is_saved = True

    def raise_if_failed(self) -> None:
        """No save of this one fails."""

    def load(self, path: Path, engine: Any) -> dict[str, Any]:
        return self.documents[int(path.name.removeprefix("step-"))]


def saving(
    checkpointer: Checkpointer,
    loader: Loader | None = None,
    window: Window | None = None,
    interval: ExpertInterval | None = None,
    max_steps: int = 5,
    best: BestConfig | None = None,
) -> tuple[Saving, Console]:
    console = Console()
    kept = {"window": window or Window(CPU), "experts": interval or ExpertInterval()}
    parts: tuple[Any, ...] = (checkpointer, None, loader or Loader(), kept, console)
    return Saving(*parts, max_steps, Best(best)), console


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (5, [5]), (0, [5])])
def test_it_saves_every_so_many_steps_and_after_the_last(every: int, expected: list[int]) -> None:
    checkpointer = Checkpointer(every)
    listener, console = saving(checkpointer)
    for step in range(1, 6):
        listener.after_step(result(step))
    listener.save(Progress(step=5))
    listener.finish()
    assert list(checkpointer.documents) == expected
    assert console.saved == expected, "each is told once, also where the end asks for it again"


def test_a_save_in_the_background_is_told_when_it_is_there() -> None:
    checkpointer = Checkpointer(every=2, in_background=True)
    listener, console = saving(checkpointer, max_steps=9)
    told = []
    for step in range(1, 7):
        # That of step 4 takes until the next step; the others until somebody waits for them.
        checkpointer.is_saved |= step == 5
        listener.after_step(result(step))
        told.append(list(console.saved))
    assert told == [[], [], [], [2], [2, 4], [2, 4]]
    listener.finish()
    assert console.saved == [2, 4, 6]


def test_the_best_evaluation_is_saved_whatever_the_step() -> None:
    checkpointer = Checkpointer(every=4)
    listener, _ = saving(checkpointer, max_steps=9, best=BEST)
    for step, loss in {1: None, 2: 3.0, 3: 3.5, 4: 3.2, 5: 2.0, 6: 2.5}.items():
        extra = {} if loss is None else {"eval/loss": loss}
        listener.after_step(replace(result(step), extra=extra))
    assert list(checkpointer.documents) == [2, 4, 5]
    assert checkpointer.best == 5

    resumed, _ = saving(checkpointer, max_steps=9, best=BEST)
    assert resumed.resume().step == 5
    resumed.after_step(replace(result(6), extra={"eval/loss": 2.0}))
    assert list(checkpointer.documents) == [2, 4, 5], "not better than before the resume"
    # Where the best one has gone, the next evaluation is the best there is.
    checkpointer.keep_best = lambda step: False  # type: ignore[method-assign]
    resumed, _ = saving(checkpointer, max_steps=9, best=BEST)
    resumed.resume()
    resumed.after_step(replace(result(7), extra={"eval/loss": 9.0}))
    assert checkpointer.best == 7


def test_a_resumed_run_stands_where_the_saved_one_stood() -> None:
    checkpointer, loader, window = Checkpointer(), Loader(), Window(CPU)
    loader.state = {"rows": 12, "order": {"seed": 7}, "streams": {"0": {"position": 3}}}
    window.add(result(4))
    interval = ExpertInterval()
    interval.add(4, result(4).sums["tokens_per_expert_LME"])
    progress = Progress(step=4, tokens=4000, target_tokens=2000)
    saving(checkpointer, loader, window, interval)[0].save(progress)

    # Other ranks' streams join this rank's on disk.
    checkpointer.documents[4]["loader"] = {"0": {"position": 3}, "1": {"position": 9}}
    new_loader, new_window, new_interval = Loader(), Window(CPU), ExpertInterval()
    assert saving(checkpointer, new_loader, new_window, new_interval)[0].resume() == progress
    assert new_loader.state == loader.state | {"streams": {"0": {"position": 3}, "1": {"position": 9}}}
    assert new_window.state_dict() == window.state_dict()
    assert new_interval.state_dict() == interval.state_dict() != {}


def test_a_checkpoint_without_what_is_kept_is_refused() -> None:
    checkpointer = Checkpointer()
    saving(checkpointer)[0].save(Progress(step=3))
    del checkpointer.documents[3]["extra"]["experts"]
    with pytest.raises(
        ConfigError, match="step-3 was saved by another version: it lacks experts; go on with"
    ):
        saving(checkpointer)[0].resume()


def test_without_a_checkpoint_it_starts_anew() -> None:
    loader = Loader()
    assert saving(Checkpointer(), loader)[0].resume() == Progress()
    assert loader.state == Loader().state


def test_a_finished_run_started_again_tells_of_no_save() -> None:
    checkpointer = Checkpointer()
    saving(checkpointer)[0].save(Progress(step=5))
    listener, console = saving(checkpointer)
    listener.save(listener.resume())
    listener.finish()
    assert console.saved == []
