"""`cantata verify HF_DIR`: the native model against transformers, on the same weights and inputs.

R, W  rows and columns of an image's patches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cantata.core.types import IGNORE_INDEX, IMAGE, TEXT, Batch, Images, Segments
from cantata.models.aria.hf import AriaLayout
from cantata.models.aria.model import Aria, aria_from_hub
from cantata.models.aria.vision import patch_position_ids
from cantata.models.emu3.hf import MODEL_TYPES, Emu3Layout
from cantata.models.emu3.model import Emu3, emu3_from_hub
from cantata.models.hub import CONFIG, load_from_hub, read_json
from cantata.models.mllama.config import Masking
from cantata.models.mllama.hf import MODEL_TYPES as MLLAMA_TYPES
from cantata.models.mllama.hf import MllamaLayout
from cantata.models.mllama.model import Mllama, mllama_from_hub
from cantata.tools import verify_mllama
from cantata.tools.arguments import Parser
from cantata.tools.compared import (
    GRADIENT,
    GRADIENT_BOUND,
    LOGITS_BOUND,
    LOSS_BOUND,
    Check,
    relative_error,
    transformers_model,
)
from cantata.tools.verify_aimv2 import AIMV2_TYPES, compare_aimv2

Layout = AriaLayout | Emu3Layout | MllamaLayout
Model = Aria | Emu3 | Mllama


class Sample(NamedTuple):
    """One sequence; all its images are padded to one size, as transformers wants them."""

    input_ids: list[int]
    side: int
    """Patches along the padded square, of Aria."""
    images: list[Tensor]
    """Normalised pixels of each image's valid patches, (R, W, C); of Mllama see `verify_mllama`."""


def synthetic_samples(layout: Layout, seed: int) -> list[Sample]:
    """Per projector entry one sample with two images of different shapes, and one of text alone.

    For Emu3, whose images are tokens too, three of tokens alone; for Mllama see `verify_mllama.PLANS`.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = [Sample(_tokens(layout, 9, generator), 0, [])]
    if isinstance(layout, Emu3Layout):
        return [*samples, *(Sample(_tokens(layout, length, generator), 0, []) for length in (4, 17))]
    if isinstance(layout, MllamaLayout):
        return [_mllama_sample(layout, plan, generator) for plan in verify_mllama.PLANS]
    for patches, features in layout.projector.patch_to_query.items():
        side = math.isqrt(patches)
        input_ids, images = _tokens(layout, 4, generator), []
        for rows, columns in ((side, max(1, 2 * side // 3)), (max(1, side // 2), side)):
            images.append(torch.randn(rows, columns, layout.vision.patch_values, generator=generator))
            input_ids += [layout.image_token_id] * features + _tokens(layout, 5, generator)
        samples.append(Sample(input_ids, side, images))
    return samples


def _mllama_sample(layout: MllamaLayout, plan: Sequence[int], generator: torch.Generator) -> Sample:
    """Text, then each image with a few words; without a tower text alone."""
    input_ids, images = _tokens(layout, 4, generator), list[Tensor]()
    if layout.vision is not None:
        images = verify_mllama.random_images(layout.vision, plan, generator)
    for number in range(len(images)):
        # The last but one of several has no word of its own: they are read together.
        words = 0 if 0 < number == len(images) - 2 else 5
        input_ids += [layout.image_token_id, *_tokens(layout, words, generator)]
    return Sample(input_ids, 0, images)


def _tokens(layout: Layout, count: int, generator: torch.Generator) -> list[int]:
    # transformers gives the padding token's embedding no gradient, so no sample holds it.
    special = (layout.image_token_id, layout.text.pad_token_id)
    allowed = [i for i in range(layout.text.vocab_size) if i not in special]
    picks: list[int] = torch.randint(len(allowed), (count,), generator=generator).tolist()
    return [allowed[i] for i in picks]


def pack(samples: Sequence[Sample], layout: Layout, padding: int = 0) -> Batch:
    """The samples as one native batch, with `padding` tokens at its end."""
    ids = [torch.tensor(sample.input_ids, dtype=torch.int64) for sample in samples]
    labels = [torch.cat((i[1:], i.new_tensor([IGNORE_INDEX]))) for i in ids]
    tail = torch.full((padding,), layout.text.pad_token_id)
    input_ids_T = torch.cat([*ids, tail])
    labels_T = torch.cat([*labels, torch.full_like(tail, IGNORE_INDEX)])
    labels_T[labels_T == layout.image_token_id] = IGNORE_INDEX
    placeholder_T = input_ids_T == layout.image_token_id
    modality_ids_T = torch.where(placeholder_T, IMAGE, TEXT)
    modality_ids_T[len(input_ids_T) - padding :] = -1
    target_index_N = (labels_T != IGNORE_INDEX).nonzero().flatten()
    segments = Segments(tuple(len(i) for i in ids))
    kinds = torch.tensor([IMAGE if sample.images else TEXT for sample in samples], dtype=torch.int64)
    return Batch(
        input_ids_T=input_ids_T,
        labels_T=labels_T,
        position_ids_T=torch.cat([*(torch.arange(len(i)) for i in ids), torch.zeros_like(tail)]),
        modality_ids_T=modality_ids_T,
        target_index_N=target_index_N,
        target_modality_N=kinds[segments.ids()[target_index_N]],
        samples=segments,
        images=_pack_images(samples, layout, placeholder_T.nonzero().flatten()),
    )


def _pack_images(samples: Sequence[Sample], layout: Layout, token_index_Q: Tensor) -> Images:
    if isinstance(layout, Emu3Layout):
        return Images(torch.zeros(0, 0), token_index_Q, Segments(()), Segments(()), token_index_Q)
    if isinstance(layout, MllamaLayout):
        given = [image for sample in samples for image in sample.images]
        return verify_mllama.pack_images(layout.vision, given, token_index_Q)
    images = [(sample.side, image) for sample in samples for image in sample.images]
    features = [layout.projector.patch_to_query[side**2] for side, _ in images]
    grid, no_patches = layout.vision.grid, torch.zeros(0, layout.vision.patch_values)
    positions = [patch_position_ids(image.shape[0], image.shape[1], grid) for _, image in images]
    return Images(
        patches_PC=torch.cat([no_patches, *(image.flatten(0, 1) for _, image in images)]),
        position_ids_P=torch.cat([torch.zeros(0, dtype=torch.int64), *positions]),
        patches=Segments(tuple(len(ids) for ids in positions)),
        features=Segments(tuple(features)),
        token_index_Q=token_index_Q,
    )


def transformers_inputs(sample: Sample, layout: Layout) -> dict[str, Tensor]:
    """The sample as the family's class takes it."""
    input_ids = torch.tensor([sample.input_ids])
    labels = input_ids.masked_fill(input_ids == layout.image_token_id, IGNORE_INDEX)
    inputs = {"input_ids": input_ids, "labels": labels}
    if sample.images and isinstance(layout, MllamaLayout) and layout.vision is not None:
        token = layout.image_token_id
        return inputs | verify_mllama.image_inputs(layout.vision, sample.input_ids, sample.images, token)
    if sample.images and isinstance(layout, AriaLayout):
        channels, size = layout.vision.num_channels, layout.vision.patch_size
        pixels = torch.zeros(len(sample.images), channels, sample.side * size, sample.side * size)
        mask = torch.zeros(len(sample.images), sample.side * size, sample.side * size, dtype=torch.bool)
        for i, image in enumerate(sample.images):
            rows, columns = image.shape[0] * size, image.shape[1] * size
            blocks = image.view(*image.shape[:2], channels, size, size).permute(2, 0, 3, 1, 4)
            pixels[i, :, :rows, :columns] = blocks.reshape(channels, rows, columns)
            mask[i, :rows, :columns] = True
        inputs |= {"pixel_values": pixels, "pixel_mask": mask}
    return inputs


def run_transformers(model: Any, samples: Sequence[Sample], layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean loss over all targets, its gradients left on the model, and the logits, sample after sample."""
    results = []
    for sample in samples:
        inputs = transformers_inputs(sample, layout)
        targets = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        output = model(**inputs, use_cache=False)
        results.append((output.loss * targets, targets, output.logits[0].detach()))
    losses, counts, logits = zip(*results, strict=True)
    loss = torch.stack(losses).sum() / sum(counts)
    loss.backward()
    return loss.detach(), torch.cat(logits)


def run_native(model: Model, samples: Sequence[Sample], layout: Layout) -> tuple[Tensor, Tensor]:
    """The same of the native model, from one packed batch with a padding tail."""
    batch = pack(samples, layout, padding=3)
    output = model(batch, with_logits=True)
    loss = output.loss_sum / batch.num_targets
    loss.backward()
    assert output.logits_TV is not None
    return loss.detach(), output.logits_TV.detach()[: batch.num_tokens]


def compare(native: Model, reference: Any, layout: Layout, seed: int) -> Iterator[Check]:
    """Loss, logits and every parameter's gradient on synthetic samples; both models in fp32."""
    samples = synthetic_samples(layout, seed)
    loss, logits = run_native(native, samples, layout)
    reference_loss, reference_logits = run_transformers(reference, samples, layout)
    yield Check("logits", relative_error(logits, reference_logits, reference_logits), LOGITS_BOUND)
    yield Check("loss", relative_error(loss, reference_loss, reference_loss), LOSS_BOUND)
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in native.named_parameters():
        key = layout.transformers_name(name)
        expected = gradients[key]
        if expected is None and parameter.grad is None:
            continue
        zero = torch.zeros_like(parameter)
        gradient = zero if parameter.grad is None else parameter.grad
        expected = zero if expected is None else expected.reshape(parameter.shape)
        # A key bias moves all scores of a query alike, so its gradient is 0: the query bias's is the scale.
        scale_of = gradients[key.replace("k_proj.bias", "q_proj.bias")]
        error = relative_error(gradient, expected, scale_of if key.endswith("k_proj.bias") else expected)
        yield Check(f"{GRADIENT}{name}", error, GRADIENT_BOUND)


def verify(directory: Path, write: Callable[[str], None]) -> bool:
    """Compare on the weights of `directory`, reporting line by line; whether all bounds hold."""
    kind = read_json(directory / CONFIG).get("model_type")
    checks = list(compare_aimv2(directory) if kind in AIMV2_TYPES else _compare_language(directory, kind))
    gradients = [check for check in checks if check.name.startswith(GRADIENT)]
    gradients.sort(key=lambda check: check.error, reverse=True)
    write(f"{'':44} {'max rel. error':>14} {'bound':>8}")
    for check in [*(check for check in checks if check not in gradients), *gradients[:5]]:
        write(f"{check.name:44} {check.error:14.2e} {check.bound:8.0e} {'' if check.passed else ' FAILED'}")
    failed = sum(not check.passed for check in checks)
    verdict = f"{failed} of {len(checks)} checks failed" if failed else "equal to transformers"
    write(f"{len(gradients)} gradients compared; {verdict}")
    return not failed


def _compare_language(directory: Path, kind: str | None) -> Iterator[Check]:
    native, name = _native(directory, kind)
    layout = native.hub_layout()
    load_from_hub(native, layout, directory)
    # Dropout is the one thing that differs, by chance, from run to run.
    native.eval()
    yield from compare(native, transformers_model(directory, name), layout, seed=0)


def _native(directory: Path, model_type: str | None) -> tuple[Model, str]:
    """The model of a folder, and the class of transformers that it is compared with."""
    if model_type in MODEL_TYPES:
        return emu3_from_hub(directory), "Emu3ForCausalLM"
    if model_type in MLLAMA_TYPES:
        native = mllama_from_hub(directory, Masking.transformers)
        kind = "MllamaForCausalLM" if native.vision_config is None else "MllamaForConditionalGeneration"
        return native, kind
    return aria_from_hub(directory), "AriaForConditionalGeneration"


def main(arguments: Sequence[str]) -> int:
    """The command: 0 if native and transformers agree, 1 if not."""
    parser = Parser(prog="cantata verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", metavar="HF_DIR", type=Path, help="a Hugging Face model directory")
    return 0 if verify(parser.parse_args(arguments).directory, print) else 1
