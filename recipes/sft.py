"""Supervised fine-tuning: next-token prediction on what the assistant says, from published or own weights.

python recipes/sft.py experiment=emoji_sft model.weights=outputs/aria_mini-hf
torchrun --nproc-per-node 8 recipes/sft.py experiment=aria_nlvr2 model.weights=Aria data.sources.chat...
"""

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, resolved, stage_main
from cantata.infer.fine_tune import fine_tune
from cantata.train.stage import FineTuneStage


@stage_main("sft")
def main(node: DictConfig) -> int:
    return fine_tune(load(node, FineTuneStage), "sft", resolved(node))


if __name__ == "__main__":
    main()
