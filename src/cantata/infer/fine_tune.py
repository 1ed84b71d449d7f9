"""What the fine-tuning recipes share: model, data, and a session that is judged by its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cantata.core.dist import distributed, find_process
from cantata.infer.answers import Answers
from cantata.models.protocol import LanguageModel
from cantata.parallel.mesh import validate
from cantata.train.objectives import NextToken
from cantata.train.session import run_session
from cantata.train.stage import FineTuneStage, build_data, build_model, require_weights


def fine_tune(stage: FineTuneStage, kind: str, resolved: Mapping[str, Any]) -> int:
    """Run a fine-tuning stage; returns the exit code.

    Args:
        kind: the stage's name, for the report.
        resolved: the whole configuration as plain values.

    Raises `ConfigError` and `RunError` as `run_session` does.
    """
    require_weights(stage)
    validate(stage.mesh, find_process().world_size)
    model = build_model(stage)
    assert isinstance(model, LanguageModel)
    loader, held_out = build_data(stage, model)
    with distributed(stage.train.patience):
        answers = Answers(stage.accuracy, held_out, stage.out, stage.train.tokens_per_micro_batch)
        objective = NextToken(model.balance)
        return run_session(stage, kind, model, objective, loader, held_out, resolved, answers)
