"""Numbers under `train` that no run can use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cantata.core.errors import ConfigError
from tests.train.test_loop import CONFIG

POSITIVE = ["max_steps", "micro_batch_size", "gradient_accumulation_steps", "sequence_length", "log_every"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in POSITIVE for value in (0, -1)),
        *(("eval_every", -1), ("expert_every", -1)),
        *(("clip_grad_norm", 0.0), ("expert_load_warning", 1.0), ("hang_seconds", 0.0)),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{key}={value} must be"):
        replace(CONFIG, **{key: value})


def test_never_evaluating_and_not_clipping_are_choices() -> None:
    config = replace(CONFIG, eval_every=0, clip_grad_norm=None, expert_every=0, expert_load_warning=None)
    assert (config.eval_every, config.clip_grad_norm) == (0, None)
    assert (config.expert_every, config.expert_load_warning) == (0, None)


def test_ranks_wait_longer_for_each_other_than_the_watchdog_for_a_step() -> None:
    waits = {bound: replace(CONFIG, hang_seconds=bound).patience for bound in (2.0, 600.0, None)}
    assert waits == {2.0: 600.0, 600.0: 1200.0, None: None}
