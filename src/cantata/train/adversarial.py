"""What a critic and the model that it judges minimise: pure functions of logits and gradients.

B  images or clips    T  frames    C  channels    H, W  rows and columns    P  patches
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight, conv3d_weight

from cantata.core.dist import all_reduce_sum

LARGEST_WEIGHT = 1e4
"""Bound of the adaptive weight, where the critic's gradient all but vanishes."""
TINY = 1e-4
"""Added to the norm that the adaptive weight divides by."""


class Adversarial(Enum):
    """How logits become losses."""

    hinge = "hinge"
    """`relu(1 - real)`, `relu(1 + fake)` and `-fake` (Lim and Ye 2017, arXiv:1705.02894)."""
    non_saturating = "non_saturating"
    """Cross entropy, and the model's with flipped labels (Goodfellow et al. 2014, arXiv:1406.2661)."""


def discriminator_loss(kind: Adversarial, real_BP: Tensor, fake_BP: Tensor) -> Tensor:
    """What the critic minimises, the mean over patches of each image and over its real and its fake, (B,)."""
    if kind is Adversarial.hinge:
        real, fake = F.relu(1 - real_BP), F.relu(1 + fake_BP)
    else:
        real, fake = F.softplus(-real_BP), F.softplus(fake_BP)
    return 0.5 * (real.mean(1) + fake.mean(1))


def generator_loss(kind: Adversarial, fake_BP: Tensor) -> Tensor:
    """What the judged model minimises, (B,)."""
    return (-fake_BP if kind is Adversarial.hinge else F.softplus(-fake_BP)).mean(1)


def lecam(real_BP: Tensor, fake_BP: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """LeCam regularisation of each image, (B,) (Tseng et al. 2021, arXiv:2104.03310).

    Squared distances of logits on real images to the running mean of those on fakes, and the other way
    round: a critic that tells them apart more and more clearly pays for it.
    """
    return (real_BP - mean_fake).square().mean(1) + (fake_BP - mean_real).square().mean(1)


def last_layer_gradient(last_input: Tensor, layer: nn.Module, gradient_BTCHW: Tensor) -> Tensor:
    """The gradient of the last convolution's weight, of which only the shape is read, fp32.

    Args:
        last_input: what the convolution read: (B * T, C, H, W), or (B, C, T, H, W) of a 3-D one. Frames
            beyond those of the gradient are ones that the model did not give out.
        gradient_BTCHW: of the loss by the reconstruction.
    """
    assert isinstance(layer, nn.Conv2d | nn.Conv3d)
    # Under a sharding engine the weight's own shape may be that of a part, or none.
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    x, gradient = last_input.detach().float(), gradient_BTCHW.float()
    frames = gradient.shape[1]
    if isinstance(layer, nn.Conv3d):
        dropped = x.shape[2] - frames
        gradient_BCTHW = F.pad(gradient, (0, 0) * 3 + (0, dropped)).transpose(1, 2)
        of_weight: Tensor = conv3d_weight(x, shape, gradient_BCTHW, *options)  # type: ignore[no-untyped-call]
        return of_weight
    dropped = x.shape[0] // gradient.shape[0] - frames
    gradient_FCHW = F.pad(gradient, (0, 0) * 3 + (0, dropped)).flatten(0, 1)
    of_weight = conv2d_weight(x, shape, gradient_FCHW, *options)  # type: ignore[no-untyped-call]
    return of_weight


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, share: Tensor) -> Tensor:
    """`|reconstruction| / (|adversarial| + 1e-4)`, at most 1e4 (Esser et al. 2020, arXiv:2012.09841).

    Both are gradients of the last layer's weight, of this rank's share of the step's loss; they are summed
    over ranks first, so ranks together weigh as one process would that holds all their images.

    Args:
        share: the part of the step that this rank's micro-batch is; dividing the sums by that of all ranks
            makes them gradients of means, as in the paper, however many micro-batches make a step.
    """
    parts = torch.cat([reconstruction.flatten(), adversarial.flatten(), share.reshape(1)])
    total = all_reduce_sum(parts.double())
    mean = total[:-1] / total[-1]
    of_reconstruction, of_adversarial = torch.split(mean, reconstruction.numel())
    norms = [torch.linalg.vector_norm(part) for part in (of_reconstruction, of_adversarial)]
    weight: Tensor = (norms[0] / (norms[1] + TINY)).clamp(max=LARGEST_WEIGHT).float()
    return weight
