"""The config root of image tokenizer training, and what only that stage builds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cantata.core import dist
from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.schema import slot
from cantata.data.assembly import build_held_out_images, build_image_loader
from cantata.data.config import ImageDataConfig
from cantata.data.held_out import HeldOut
from cantata.data.loader import Loader
from cantata.models.protocol import ImageTokenizer
from cantata.nn.perceptual.base import Perceptual
from cantata.nn.perceptual.inception import Inception
from cantata.train.config import TrainConfig
from cantata.train.critic import Critic, CriticConfig
from cantata.train.image_metrics import ImageMetrics
from cantata.train.reconstruction import LossConfig, Reconstruction
from cantata.train.stage import Stage


@dataclass(frozen=True, kw_only=True)
class TokenizerStage(Stage):
    """Every key of training an image tokenizer."""

    data: ImageDataConfig
    collator: dict[str, Any] = slot(runtime=("grid",))
    train: TrainConfig
    loss: LossConfig
    perceptual: dict[str, Any] | None = slot()
    """Network whose features tell how like two images are; null: none."""
    inception: Path | None
    """File of Inception's weights, by which evaluations tell rFID; null: they leave it out."""
    critic: CriticConfig | None
    """Discriminator that learns to tell reconstructions from images; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mesh.ep != 1:
            raise ConfigError(f"mesh.ep={self.mesh.ep}: an image tokenizer has no experts; set mesh.ep=1")


def build_image_data(stage: TokenizerStage, model: nn.Module) -> tuple[Loader, HeldOut]:
    """Training and held-out batches of this rank; opens every file, so what is missing is found first.

    Raises `ConfigError` for sizes that the model cannot take.
    """
    assert isinstance(model, ImageTokenizer)
    process = dist.find_process()
    collator = build(stage.collator, grid=model.grid)
    shape = {
        "micro_batch_size": stage.train.micro_batch_size,
        "rank": process.rank,
        "world_size": process.world_size,
    }
    loader = build_image_loader(stage.data, collator, seed=stage.seed, **shape)
    return loader, build_held_out_images(stage.data, collator, **shape)


def build_objective(stage: TokenizerStage, model: nn.Module) -> tuple[Reconstruction, Critic | None]:
    """What the model learns by, and the critic that learns beside it.

    Raises `ConfigError` where the weights of a perceptual network or of Inception are not there.
    """
    assert isinstance(model, ImageTokenizer)
    perceptual: Perceptual | None = None
    if stage.perceptual is not None:
        perceptual = build(stage.perceptual).to(dist.device())
    critic = None
    if stage.critic is not None:
        critic = Critic(stage.critic, stage.seed, stage.train.max_steps, dist.device())
    inception = None if stage.inception is None else Inception(stage.inception).to(dist.device())
    metrics = ImageMetrics(perceptual, inception)
    return Reconstruction(stage.loss, perceptual, critic, model.last_layer, metrics), critic
