"""Pretraining on text and captioned images, from scratch or from weights: next tokens, patches, or pairs.

python recipes/pretrain.py experiment=aria_mini
torchrun --nproc-per-node 2 recipes/pretrain.py experiment=aria_mini
"""

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, resolved, stage_main
from cantata.core.dist import distributed, find_process
from cantata.infer.captions import caption_probe
from cantata.parallel.mesh import validate
from cantata.train.session import run_session
from cantata.train.stage import PretrainStage, build_data, build_model, build_objective


@stage_main("pretrain")
def main(node: DictConfig) -> int:
    stage = load(node, PretrainStage)
    validate(stage.mesh, find_process().world_size)
    model = build_model(stage)
    objective = build_objective(stage, model)
    loader, held_out = build_data(stage, model)
    with distributed(stage.train.patience):
        probe = caption_probe(model, held_out, stage.out)
        return run_session(stage, "pretrain", model, objective, loader, held_out, resolved(node), probe)


if __name__ == "__main__":
    main()
