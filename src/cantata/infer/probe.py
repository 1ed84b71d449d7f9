"""What a frozen image encoder knows: classes of images by an attentive probe, or by the names of the classes.

P  patches of all images    I  images    D  hidden size    K  classes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.samples import ImagePatches
from cantata.core.types import Images, Segments
from cantata.models.aimv2.vision import PoolingHead
from cantata.models.protocol import PairEncoder
from cantata.nn.matmul import Linear
from cantata.nn.norm import RMSNorm

BATCH = 64
"""Images that go through the encoder at once."""
_EPS = 1e-5


class Labelled(NamedTuple):
    """Images with the numbers of their classes."""

    images: Sequence[ImagePatches]
    classes_I: Tensor
    """int64."""

    def majority(self) -> float:
        """What always saying the commonest class would get right."""
        return max(Counter(self.classes_I.tolist()).values()) / len(self.images)


class ProbeSettings(NamedTuple):
    """How a probe learns."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int


class AttentiveProbe(nn.Module):
    """Norm, learned queries over an image's patches, a linear layer: as AIM is probed (arXiv:2401.08541)."""

    def __init__(self, hidden_size: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, _EPS)
        self.pool = PoolingHead(hidden_size, num_heads)
        self.classify = Linear(hidden_size, num_classes)

    def forward(self, x_PD: Tensor, patches: Segments) -> Tensor:
        """Logits of the classes, (I, K)."""
        return self.classify(self.pool(self.norm(x_PD), patches))


def packed(images: Sequence[ImagePatches], device: torch.device) -> Images:
    """Images as an encoder takes them, without places among tokens."""
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return Images(
        torch.cat([torch.from_numpy(image.patches_PC) for image in images]).to(device),
        torch.cat([torch.from_numpy(image.position_ids_P) for image in images]).to(device),
        Segments(tuple(len(image.patches_PC) for image in images)),
        Segments((0,) * len(images)),
        empty,
    )


@torch.no_grad()
def features(
    encode: Callable[[Images], Tensor], images: Sequence[ImagePatches], device: torch.device
) -> list[Tensor]:
    """The frozen encoder's features of each image, (patches, D) each; all are kept in memory."""
    found: list[Tensor] = []
    for start in range(0, len(images), BATCH):
        batch = packed(images[start : start + BATCH], device)
        found += torch.split(encode(batch).float(), list(batch.patches.lengths))
    return found


def probe_accuracy(
    encode: Callable[[Images], Tensor],
    num_heads: int,
    train: Labelled,
    test: Labelled,
    num_classes: int,
    settings: ProbeSettings,
    device: torch.device,
) -> float:
    """Share of `test` that a probe gets right which learned on `train`; the encoder does not change.

    Samples, initial values and order follow from the seed.
    """
    learned, asked = (features(encode, one.images, device) for one in (train, test))
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.device(device):
        probe = AttentiveProbe(learned[0].shape[1], num_heads, num_classes)
    _initialise(probe, generator)
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        chosen = torch.randperm(len(learned), generator=generator)[: settings.batch_size].tolist()
        wanted = train.classes_I[chosen].to(device)
        loss = F.cross_entropy(_logits(probe, [learned[i] for i in chosen]), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        right = (_logits(probe, asked).argmax(1).cpu() == test.classes_I).sum().item()
    return right / len(asked)


@torch.no_grad()
def zero_shot_accuracy(
    model: PairEncoder,
    texts: Sequence[Sequence[int]],
    test: Labelled,
    device: torch.device,
) -> float:
    """Share of `test` whose class is the one with the nearest text; `texts` are token ids, a class each."""
    ids = torch.tensor([token for text in texts for token in text], device=device)
    positions = torch.cat([torch.arange(len(text), device=device) for text in texts])
    text_KD = model.text_features(ids, positions, Segments(tuple(map(len, texts))))
    right = 0
    for start in range(0, len(test.images), BATCH):
        image_ID = model.image_features(packed(test.images[start : start + BATCH], device))
        classes_I = test.classes_I[start : start + BATCH]
        right += int(((image_ID @ text_KD.t()).argmax(1).cpu() == classes_I).sum())
    return right / len(test.images)


def _logits(probe: AttentiveProbe, parts: Sequence[Tensor]) -> Tensor:
    logits_IK: Tensor = probe(torch.cat(list(parts)), Segments(tuple(map(len, parts))))
    return logits_IK


def _initialise(probe: AttentiveProbe, generator: torch.Generator) -> None:
    """Norms 1, biases 0, the rest normal at 1 / sqrt(width); drawn on the host, alike on every device."""
    with torch.no_grad():
        for name, parameter in probe.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif not name.startswith("norm."):
                drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                parameter.copy_(drawn)
