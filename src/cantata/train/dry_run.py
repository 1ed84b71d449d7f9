"""The peak memory of forward and backward, found by running them without data.

Tensors without storage still have shapes and lifetimes, and autograd keeps and frees them exactly as it
does in earnest. Counting what is alive needs no formula for each model family, and follows recomputation,
packing and the head's chunks by itself. It works because no forward of ours looks at values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from cantata.core.types import Batch, Images, ModelOutput, PixelBatch, Segments
from cantata.models.protocol import (
    LanguageModel,
    PairEncoder,
    PairFeatures,
    PatchOutput,
    PatchPredictor,
    ReadsAcross,
    TokenizerOutput,
    Trainable,
)
from cantata.nn.head import LanguageHead
from cantata.nn.moe.balance import balance_loss
from cantata.parallel.recompute import Recompute, apply_recompute
from cantata.train.live_bytes import LiveBytes, Purpose
from cantata.train.one_rank import Elements, expert_ids
from cantata.train.repeated import equal_blocks, shorten


class Peak(NamedTuple):
    """Bytes at the moment at which most are alive."""

    total: int
    logits: int
    """Of `total`: see `Purpose`."""
    all_to_all: int


def peak_activation_bytes(
    model: Trainable,
    batch: Batch | PixelBatch,
    compute_dtype: torch.dtype,
    recompute: Recompute,
    device: torch.device,
    gradient_bytes: Callable[[Elements], int],
    *,
    every_block: bool = False,
) -> Peak:
    """Most bytes alive at once in forward and backward, the batch included, weights left out.

    A parameter's gradient counts from when it is made until it could be reduced, which is at once; what is
    left of it then is `gradient_bytes`.

    Args:
        model: on the meta device, as one rank computes with it (`one_rank.on_one_rank`); it stays as it is.
        batch: its values do not matter.
        compute_dtype: of the weights while they compute.
        device: whose code paths to follow. The meta device stands in for all but the CPU: it takes the
            paths of accelerators.
        gradient_bytes: bytes that stay of a gradient of so many elements.
        every_block: run all of a model's equal blocks, which finds the same and takes longer.
    """
    assert isinstance(model, nn.Module)
    stand_in = copy.deepcopy(model).to(compute_dtype)
    on_cpu = device.type == "cpu"
    predicted = batch.images.predicted() if isinstance(batch, Batch) else None
    with FakeTensorMode() if on_cpu else nullcontext():
        if on_cpu:
            _onto_fake_cpu(stand_in)
        live, experts = LiveBytes(), expert_ids(stand_in)
        for unit in stand_in.units():
            _fuse_attention(unit.module)
            if unit.is_block:
                apply_recompute(unit.module, recompute)
        for module in stand_in.modules():
            if isinstance(module, LanguageHead):
                live.during(module, Purpose.logits)

        def left_of_gradient(parameter: Tensor) -> int:
            return gradient_bytes(Elements.of([parameter], experts))

        # Where layers are told apart by their number, every one must run.
        for run in [] if every_block or isinstance(model, ReadsAcross) else equal_blocks(stand_in.units()):
            shorten(run, live, lambda block: sum(map(left_of_gradient, _trained(block))))

        def reduce_gradient(parameter: Tensor) -> None:
            live.add(left_of_gradient(parameter), Purpose.gradients)
            parameter.grad = None

        for parameter in _trained(stand_in):
            parameter.register_post_accumulate_grad_hook(reduce_gradient)  # type: ignore[no-untyped-call]
        if isinstance(batch, Batch) and not isinstance(model, ReadsAcross):
            batch = _few_segments(batch)
        with live:
            batch = _without_values(batch, "cpu" if on_cpu else "meta")
            _predict(batch, predicted)
            _loss(stand_in, batch).backward()  # type: ignore[no-untyped-call]
    return Peak(live.peak, live.at_peak[Purpose.logits], live.at_peak[Purpose.all_to_all])


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def synthetic_batch(
    samples: Segments,
    patches: Segments,
    features: Segments,
    patch_values: int,
    first_tokens: Sequence[int] = (),
    prefix: Segments | None = None,
) -> Batch:
    """A batch of these lengths without a pixel or a word: every token is a target, image tokens come first.

    Args:
        samples: tokens of each sample.
        patches: patches of each image.
        features: features of each image; their total is at most that of the samples.
        patch_values: values of a patch, channels * patch_size ** 2.
        first_tokens: where images of one feature each stand instead.
        prefix: first patches of each image that see one another whole; None: all do.
    """
    tokens_T = torch.zeros(samples.total, dtype=torch.int64)
    return Batch(
        input_ids_T=tokens_T,
        labels_T=tokens_T,
        position_ids_T=tokens_T,
        modality_ids_T=tokens_T,
        target_index_N=torch.arange(samples.total),
        target_modality_N=tokens_T,
        samples=samples,
        images=Images(
            patches_PC=torch.zeros(patches.total, patch_values, dtype=torch.uint8),
            position_ids_P=torch.zeros(patches.total, dtype=torch.int64),
            patches=patches,
            features=features,
            token_index_Q=torch.tensor(first_tokens) if first_tokens else torch.arange(features.total),
            first_tokens=tuple(first_tokens),
            prefix=prefix,
        ),
    )


def _loss(model: nn.Module, batch: Batch | PixelBatch) -> Tensor:
    if isinstance(batch, PixelBatch):
        # What training alone adds (statistics of the rows) reads values, and is small.
        model.eval()
        made: TokenizerOutput = model(batch.pixels_BTCHW.float())
        # Both are done with when backward begins, as the losses on pixels are in earnest.
        return made.reconstruction_BTCHW.sum() + made.quantized.loss_sum
    assert isinstance(model, LanguageModel)
    if isinstance(model, PairEncoder):
        pairs: PairFeatures = model(batch)
        scores = pairs.scale * pairs.image_ID @ pairs.text_SD.t()
        return scores.logsumexp(0).sum() + scores.logsumexp(1).sum()
    if isinstance(model, PatchPredictor):
        made_patches: PatchOutput = model(batch)
        return made_patches.loss_sum + made_patches.predicted_RC.float().square().sum()
    output: ModelOutput = model(batch)
    if output.router is None or model.balance is None:
        return output.loss_sum
    # The counts of one rank stand in for those of all: they have no other shape.
    stats = output.router
    return output.loss_sum + balance_loss(stats, stats.tokens_per_expert_ME, model.balance).loss_sum


def _onto_fake_cpu(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _few_segments(batch: Batch) -> Batch:
    """The batch cut into few pieces instead of many: fused attention keeps the same, in far fewer calls.

    Pieces of one length are attended to in one call, pieces of several lengths one by one and then joined, so
    several lengths become two.
    """
    images = batch.images
    ragged = len(set(images.patches.lengths)) > 1 or len(set(images.features.lengths)) > 1
    # Images with a prefix stay as they are: their masks grow with the squares of their lengths.
    if ragged and images.prefix is None:
        images = replace(images, patches=_in_two(images.patches), features=_in_two(images.features))
    samples = _in_two(batch.samples) if len(set(batch.samples.lengths)) > 1 else batch.samples
    return replace(batch, samples=samples, images=images)


def _in_two(segments: Segments) -> Segments:
    return Segments((segments.total - 1, 1))


def _without_values(record: Any, device: str) -> Any:
    """A copy of a batch, or of a part of it, whose tensors are only shapes."""
    changed = copy.copy(record)
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            setattr(changed, name, torch.empty(value.shape, dtype=value.dtype, device=device))
        elif isinstance(value, Images):
            setattr(changed, name, _without_values(value, device))
    return changed


def _predict(batch: Batch | PixelBatch, predicted: tuple[Tensor, Tensor] | None) -> None:
    """How many patches are predicted follows from lengths alone, but torch would look for them by values."""
    if not isinstance(batch, Batch):
        return
    shapes = tuple(torch.empty(part.shape, dtype=part.dtype) for part in predicted or ())
    batch.images.predicted = lambda: shapes  # type: ignore[assignment,method-assign,return-value]


def _fuse_attention(module: nn.Module) -> None:
    """Replace the forward itself, so that the attention is the same when backward recomputes it."""
    forward = module.forward

    def fused(*args: Any, **kwargs: Any) -> Any:
        with _FusedAttention():
            return forward(*args, **kwargs)

    module.forward = fused


class _FusedAttention(TorchFunctionMode):
    """Takes fused attention, as real devices do; without storage torch would take the plain one."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            if q.device.type == "meta" and q.shape[1] != k.shape[1]:
                # As before the kernel of CUDA, which takes a key for each query.
                repeats = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return func(*args, **(kwargs or {}))
