"""Pretraining: next-token prediction on text and captioned images, from scratch or from weights.

python recipes/pretrain.py experiment=aria_mini
torchrun --nproc-per-node 2 recipes/pretrain.py experiment=aria_mini
"""

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, resolved, stage_main
from cantata.core.dist import distributed, find_process
from cantata.infer.captions import Captions
from cantata.parallel.mesh import validate
from cantata.train.objectives import NextToken
from cantata.train.session import run_session
from cantata.train.stage import LanguageStage, build_data, build_model


@stage_main("pretrain")
def main(node: DictConfig) -> int:
    stage = load(node, LanguageStage)
    validate(stage.mesh, find_process().world_size)
    model = build_model(stage)
    loader, held_out = build_data(stage, model)
    with distributed():
        return run_session(
            stage,
            "pretrain",
            model,
            NextToken(model.balance),
            loader,
            held_out,
            resolved(node),
            Captions(held_out, stage.out),
        )


if __name__ == "__main__":
    main()
