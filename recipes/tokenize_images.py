"""Images and clips into codes, once: what language models of visual tokens train on.

python recipes/tokenize_images.py tokenizer=outputs/emoji_vq
torchrun --nproc-per-node 8 recipes/tokenize_images.py tokenizer=VQ data=images ...
"""
# Not tokenize.py: a script's folder comes first where Python looks for modules, and it has one of that name.

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, stage_main
from cantata.core.dist import distributed
from cantata.tools.tokenize import TokenizeConfig, tokenize


@stage_main("tokenize")
def main(node: DictConfig) -> int:
    config = load(node, TokenizeConfig)
    with distributed():
        return tokenize(config)


if __name__ == "__main__":
    main()
