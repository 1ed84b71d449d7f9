"""Training an image tokenizer: pixels to codes and back, with any quantiser, with or without a critic.

python recipes/vq.py experiment=emoji_vq
torchrun --nproc-per-node 8 recipes/vq.py experiment=llamagen_f16 data.sources.images.dataset.path=photos
"""

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, resolved, stage_main
from cantata.core.dist import distributed, find_process
from cantata.infer.reconstructions import Reconstructions
from cantata.parallel.mesh import validate
from cantata.train.session import run_session
from cantata.train.stage import build_model
from cantata.train.tokenizer_stage import TokenizerStage, build_image_data, build_objective


@stage_main("vq")
def main(node: DictConfig) -> int:
    stage = load(node, TokenizerStage)
    validate(stage.mesh, find_process().world_size)
    model = build_model(stage)
    loader, held_out = build_image_data(stage, model)
    with distributed(stage.train.patience):
        objective, critic = build_objective(stage, model)
        probe = Reconstructions(held_out, stage.out)
        return run_session(stage, "vq", model, objective, loader, held_out, resolved(node), probe, critic)


if __name__ == "__main__":
    main()
