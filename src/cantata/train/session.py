"""A run around the loop: its directory, its checkpoints, what is told of it, and its exit code."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from cantata.core import dist
from cantata.core.build import build
from cantata.core.config import save_config
from cantata.core.errors import PREEMPTED
from cantata.core.logging import logging_to
from cantata.core.types import MODALITIES
from cantata.data.handover import deaths_told
from cantata.data.held_out import HeldOut
from cantata.data.loader import Loader
from cantata.models.protocol import ImageTokenizer, Trainable
from cantata.train import describe, rng, startup
from cantata.train.best import Best
from cantata.train.checkpoint import Checkpointer, fingerprint
from cantata.train.critic import Critic, WithCritic
from cantata.train.early_stopping import EarlyStopping
from cantata.train.engine import Engine, Objective
from cantata.train.environment import environment
from cantata.train.evaluate import Evaluation, Probe, evaluate
from cantata.train.expert_counts import ExpertInterval
from cantata.train.expert_load import LoadWarning, PeakRows
from cantata.train.expert_report import ExpertFolder, ExpertReport
from cantata.train.history import History
from cantata.train.learned_codes import learned_codes
from cantata.train.listeners import Codebook, ExpertBias, Kept, Saving, Telemetry
from cantata.train.loggers import Sinks, open_sinks
from cantata.train.loop import Listener, fit
from cantata.train.metrics import Record
from cantata.train.neftune import add_noise
from cantata.train.optim import optimizer_defaults
from cantata.train.preempt import StopRequest
from cantata.train.progress import Console
from cantata.train.stage import LanguageStage, Stage, base_identity, build_engine
from cantata.train.startup import StartupReport
from cantata.train.watchdog import Watchdog
from cantata.train.window import Device, Window


def run_session(
    stage: Stage,
    kind: str,
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    held_out: HeldOut,
    resolved: Mapping[str, Any],
    probe: Probe,
    critic: Critic | None = None,
) -> int:
    """Train from where the run directory stands to the end, or until a signal; returns the exit code.

    Args:
        kind: the stage's name, for the report.
        model: on the meta device.
        resolved: the whole configuration as plain values, for the loggers that keep it.
        probe: looks at what the model does, after each pass over the held-out samples.
        critic: learns beside the model, where the objective has one.

    Raises:
        ConfigError: an option that the engine lacks, a directory in use, or a checkpoint of another model.
        RunError: the run cannot go on.
    """
    assert isinstance(model, Trainable)
    began, stop = time.monotonic(), StopRequest()
    rng.seed_all(stage.seed, dist.rank())
    shape, needs, peaks = fingerprint(model), describe.needs(stage, model, loader), _peaks(stage, model)
    codes, engine = learned_codes(stage), _engine(stage, model, critic)
    with deaths_told(), ExitStack() as closing, contextlib.closing(iter(loader)) as batches:
        checkpointer = Checkpointer(stage.out, stage.checkpoint, shape)
        closing.callback(checkpointer.close)
        watchdog, history, console = _witnesses(stage, loader, closing)
        window = Window(Device(dist.device(), dist.world_size(), model.flops_per_token))
        interval, early = ExpertInterval(), EarlyStopping(stage.train.early_stopping, stop)
        kept: dict[str, Kept] = {"window": window, "experts": interval, "early_stopping": early, **codes}
        kept |= base_identity(stage)
        best = Best(stage.checkpoint.best)
        saving = Saving(checkpointer, engine, loader, kept, console, stage.train.max_steps, best)
        start = saving.resume()
        history.start(start.step, describe.origin(stage, model, start.step), environment())
        save_config(resolved, stage.out / "config.yaml")
        sinks = open_sinks(stage.logger, stage.out, stage.name, resolved, start.step or None, dist.rank())
        closing.callback(sinks.close)
        told = (needs, loader, held_out, start.step, sinks.notices)
        _begin(describe.report(stage, kind, model, engine, *told), console, start.step)
        evaluation = _evaluation(stage, engine, objective, held_out, console, probe, start.step)
        telemetry = _telemetry(stage, window, sinks, console)
        own = _experts(stage, model, interval, peaks, start.step or None, console, closing)
        listeners: list[Listener] = [*own, evaluation, early, telemetry, saving]
        schedule = build(stage.schedule)
        end = fit(engine, objective, batches, schedule, stage.train, listeners, start, stop, watchdog)
        saving.save(end)
        saving.finish()
        _tell_drops(console, loader, held_out)
        outcome, code = _outcome(end.step >= stage.train.max_steps, early.reason)
        history.end(end.step, outcome, code)
        took = time.monotonic() - began
        console.on_end(describe.summary(stage, outcome, end.step, took, telemetry, evaluation))
    return code


def _witnesses(stage: Stage, loader: Loader, closing: ExitStack) -> tuple[Watchdog, History, Console]:
    """Who tell of the run while it lasts; `closing` lets them go."""
    log = closing.enter_context(logging_to(stage.out))
    watchdog = Watchdog(stage.train.hang_seconds, log, dist.rank())
    closing.callback(watchdog.close)
    history = closing.enter_context(History(stage.out))
    console = Console(dist.rank())
    closing.callback(console.close)
    loader.warn = console.on_warning
    return watchdog, history, console


def _engine(stage: Stage, model: nn.Module, critic: Critic | None) -> Engine:
    if isinstance(stage, LanguageStage):
        add_noise(model, stage.train.neftune_alpha)
    engine = build_engine(stage, model)
    return engine if critic is None else WithCritic(engine, critic)


def _begin(report: StartupReport, console: Console, step: int) -> None:
    """Show the report, and keep it in the run directory."""
    if dist.is_main():
        startup.write(report)
    console.on_start(report, step)


def _tell_drops(console: Console, loader: Loader, held_out: HeldOut) -> None:
    for line in describe.dropped(loader, held_out):
        console.on_warning(line)


def _outcome(finished: bool, early: str | None) -> tuple[str, int]:
    """How the run ended, in words and as an exit code."""
    if early is not None:
        return f"done early ({early})", 0
    if finished:
        return "done", 0
    return "stopped by a signal; run the same command again to go on", PREEMPTED


def _evaluation(
    stage: Stage,
    engine: Engine,
    objective: Objective,
    held_out: HeldOut,
    console: Console,
    probe: Probe,
    start_step: int,
) -> Evaluation:
    """The held-out passes; a run from scratch makes its first one now, before the first step."""

    def run(step: int) -> Record:
        with engine.averaged():
            record = evaluate(engine, objective, held_out.passes())
            shown = probe(step, engine)
        console.on_eval(step, record | shown.record)
        for line in shown.lines:
            console.on_note(line)
        return record | shown.record

    every = stage.train.eval_every if len(held_out) else 0
    evaluation = Evaluation(run, every, stage.train.max_steps, stage.goals())
    if start_step == 0:
        evaluation.before_first_step()
    return evaluation


def _telemetry(stage: Stage, window: Window, sinks: Sinks, console: Console) -> Telemetry:
    return Telemetry(
        window,
        sinks,
        console,
        base_learning_rate=optimizer_defaults(build(stage.optimizer))[0],
        log_every=stage.train.log_every,
        max_steps=stage.train.max_steps,
    )


def _peaks(stage: Stage, model: Trainable) -> PeakRows | None:
    """Only where ranks share experts does imbalance move memory."""
    if not isinstance(stage, LanguageStage):
        return None
    watched = stage.mesh.ep > 1 and stage.train.expert_load_warning is not None
    return PeakRows(model.moe_layers()) if watched else None


def _experts(
    stage: Stage,
    model: Trainable,
    interval: ExpertInterval,
    peaks: PeakRows | None,
    resume_step: int | None,
    console: Console,
    closing: ExitStack,
) -> list[Listener]:
    """What moves and watches the experts, or moves a codebook; nothing in a model without them."""
    if isinstance(model, ImageTokenizer):
        return [Codebook(model.quantizer)]
    layers = model.moe_layers()
    if not layers or not isinstance(stage, LanguageStage):
        return []
    train = stage.train
    bias = ExpertBias(layers, model.balance)
    router, folder, path = layers[0].router, None, stage.out / "experts"
    # A run that no longer asks for entries must still drop those after its checkpoint.
    if dist.is_main() and (train.expert_every or path.exists()):
        shape = (len(layers), len(MODALITIES), router.num_experts)
        folder = ExpertFolder(path, shape, router.top_k, stage.name, resume_step)
        closing.callback(folder.close)
    report = ExpertReport(
        interval, folder, every=train.expert_every, max_steps=train.max_steps, warn=console.on_warning
    )
    if peaks is None or train.expert_load_warning is None:
        return [bias, report]
    warning = LoadWarning(
        peaks,
        even_rows=train.micro_batch_size * train.sequence_length * router.top_k,
        threshold=train.expert_load_warning,
        num_experts=router.num_experts,
        ep=stage.mesh.ep,
        warn=console.on_warning,
    )
    return [bias, report, warning]
