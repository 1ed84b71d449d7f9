"""Fine-tuning with low-rank adapters on linear layers, embeddings, head and experts; all else is frozen.

python recipes/lora.py experiment=emoji_lora model.weights=outputs/aria_mini-hf
torchrun --nproc-per-node 8 recipes/lora.py experiment=aria_nlvr2_lora model.weights=Aria
"""

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, resolved, stage_main
from cantata.infer.fine_tune import fine_tune
from cantata.train.stage import LoRAStage


@stage_main("lora")
def main(node: DictConfig) -> int:
    return fine_tune(load(node, LoRAStage), "lora", resolved(node))


if __name__ == "__main__":
    main()
