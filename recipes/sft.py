"""Supervised fine-tuning: next-token prediction on what the assistant says, from published or own weights.

python recipes/sft.py experiment=emoji_sft model.weights=outputs/aria_mini-hf
torchrun --nproc-per-node 8 recipes/sft.py experiment=aria_nlvr2 model.weights=Aria data.sources.chat...
"""

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, resolved, stage_main
from cantata.core.dist import distributed, find_process
from cantata.infer.answers import Answers
from cantata.parallel.mesh import validate
from cantata.train.objectives import NextToken
from cantata.train.session import run_session
from cantata.train.stage import FineTuneStage, build_data, build_model, require_weights


@stage_main("sft")
def main(node: DictConfig) -> int:
    stage = load(node, FineTuneStage)
    require_weights(stage)
    validate(stage.mesh, find_process().world_size)
    model = build_model(stage)
    loader, held_out = build_data(stage, model)
    with distributed():
        return run_session(
            stage,
            "sft",
            model,
            NextToken(model.balance),
            loader,
            held_out,
            resolved(node),
            Answers(stage.accuracy, held_out, stage.out, stage.train.tokens_per_micro_batch),
        )


if __name__ == "__main__":
    main()
