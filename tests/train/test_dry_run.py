"""The dry run against memory that was really used."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cantata.core.types import Batch, PixelBatch, Segments
from cantata.models.aria.config import AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.models.aria.model import Aria
from cantata.models.autoencoder import Autoencoder
from cantata.models.mllama import Mllama
from cantata.nn.moe import experts
from cantata.nn.moe.balance import balance_loss
from cantata.parallel.recompute import Recompute, apply_recompute
from cantata.train.dry_run import peak_activation_bytes, synthetic_batch
from cantata.train.one_rank import Elements, on_one_rank
from tests.models.autoencoder.small import small_autoencoder
from tests.models.mllama.mixed import encoded, mixed_batch, mixed_layout, mixed_mllama
from tests.nn.moe.small import balance
from tests.train.pixels import images

CPU = torch.device("cpu")
META = torch.device("meta")


def build(device: str) -> Aria:
    with torch.device(device):
        return Aria(
            AriaVisionConfig(64, 128, 2, 2, 32, 8, 3, 1e-6, 0.02),
            AriaProjectorConfig({16: 4}, 0.02),
            AriaTextConfig(
                320,
                64,
                2,
                4,
                2,
                16,
                1e4,
                1e-6,
                512,
                False,
                0.02,
                1,
                2,
                0,
                AriaMoEConfig(8, 2, 1, 48, 1, 1, balance(8, aux=1e-3, z=1e-5)),
            ),
            9,
        )


def batch() -> Batch:
    return synthetic_batch(Segments((100, 30, 126)), Segments((16, 12)), Segments((4, 4)), 192)


def nothing(elements: Elements) -> int:
    return 0


def really_used(dtype: torch.dtype, recompute: Recompute) -> int:
    """Peak of what the allocator handed out during forward and backward on the CPU."""
    torch.manual_seed(0)
    model = build("cpu").to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for unit in model.units():
        if unit.is_block:
            apply_recompute(unit.module, recompute)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    inputs = batch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(inputs)
        assert output.router is not None
        stats = output.router
        balanced = balance_loss(stats, stats.tokens_per_expert_ME, model.balance)
        (output.loss_sum + balanced.loss_sum).backward()
    return highest(profiler)


def pixels_really_used(model: Autoencoder, inputs: PixelBatch) -> int:
    """The same of a tokenizer's reconstruction and its quantiser's loss."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(inputs.pixels_BTCHW.float())
        (output.reconstruction_BTCHW.sum() + output.quantized.loss_sum).backward()
    return highest(profiler)


def highest(profiler: Any) -> int:
    """Most bytes that were handed out at once."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", Recompute)
def test_the_dry_run_finds_the_real_peak(
    dtype: torch.dtype, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on devices: the loop over experts that the CPU prefers needs their counts.
    monkeypatch.setattr(experts, "can_group", lambda *tensors: True)
    used = really_used(dtype, recompute)
    # Kernels allocate inside themselves, which shows in a model this small: up to a copy of one fc1 (98 KB),
    # which the CPU's grouped product lays out anew where backward wants it transposed.
    found = peak_activation_bytes(build("meta"), batch(), dtype, recompute, CPU, nothing)
    assert found.total == pytest.approx(used, rel=0.09)


def test_the_dry_run_leaves_the_model_alone_and_knows_what_recomputation_saves() -> None:
    model = build("meta")
    accelerator = torch.device("meta")
    peaks = [
        peak_activation_bytes(model, batch(), torch.bfloat16, recompute, accelerator, nothing)
        for recompute in (Recompute.none, Recompute.selective, Recompute.full)
    ]
    assert peaks[0].total > peaks[1].total > peaks[2].total
    assert peaks[0] == peak_activation_bytes(
        model, batch(), torch.bfloat16, Recompute.none, accelerator, nothing
    )
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_logits_are_what_the_head_makes_and_rows_that_travel_are_told_apart() -> None:
    """Of a head whose logits outweigh all else; without experts of others nothing travels."""
    whole = build("meta")
    alone = peak_activation_bytes(whole, batch(), torch.float32, Recompute.none, META, nothing)
    targets, vocabulary = batch().samples.total, whole.text_config.vocab_size
    # Logits and their softmax at least; beside them the gradients of 64 columns and of the matrix.
    assert alone.logits >= 2 * 4 * targets * vocabulary
    assert alone.all_to_all == 0
    spread = peak_activation_bytes(
        on_one_rank(whole, 4), batch(), torch.float32, Recompute.none, META, nothing
    )
    assert spread.logits == alone.logits
    # The rows that came are kept for backward in both layers: 256 tokens, 2 experts each, 64 values.
    assert spread.all_to_all >= 2 * 256 * 2 * 64 * 4
    assert spread.total > alone.total


def test_the_batch_counts() -> None:
    """Positions of 256 tokens that a model takes as 32 bits make it smaller by as much."""
    given = batch()
    wide, narrow = (
        peak_activation_bytes(
            build("meta"),
            replace(given, position_ids_T=given.position_ids_T.to(dtype)),
            torch.float32,
            Recompute.none,
            META,
            nothing,
        ).total
        for dtype in (torch.int64, torch.int32)
    )
    assert wide - narrow == 4 * given.samples.total


def test_the_dry_run_of_a_tokenizer_finds_the_real_peak() -> None:
    inputs = images(6, side=32)
    model = small_autoencoder()
    used = pixels_really_used(model, inputs)
    found = peak_activation_bytes(model.to("meta"), inputs, torch.float32, Recompute.none, CPU, nothing)
    # Convolutions allocate inside themselves what no operator shows.
    assert found.total == pytest.approx(used, rel=0.15)


def test_the_dry_run_keeps_what_stands_where_for_a_model_that_reads_across() -> None:
    """Images of several sizes, neighbours among them, through shapes alone: as much as with values."""
    given, model = mixed_batch(encoded("everything")), mixed_mllama()
    assert len(set(given.images.patches.lengths)) > 1
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(given).loss_sum.backward()
    used = highest(profiler)
    with torch.device("meta"):
        shapes = Mllama(*mixed_layout())
    found = peak_activation_bytes(shapes, given, torch.float32, Recompute.none, CPU, nothing)
    # Kernels allocate inside themselves, and the loss takes its rows in one chunk here.
    assert found.total == pytest.approx(used, rel=0.15)
