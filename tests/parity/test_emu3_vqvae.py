"""Emu3's tokenizer against transformers on the same weights: codes, pixels, gradients, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from cantata.models.emu3.vqvae import Emu3VQVAE, emu3_vqvae_from_hub
from cantata.models.hub import HubReader, HubWriter
from cantata.parallel.materialize import materialize, persistent_tensors
from tests.models.autoencoder.small import pixels
from tests.models.emu3.vqvae.small import small_shape, small_vqvae

SHAPES = [
    small_shape(),
    pytest.param(
        small_shape(
            channel_multipliers=(2, 1, 3), num_res_blocks=2, attention_levels=(2,), temporal_factor=2
        ),
        marks=pytest.mark.slow,
    ),
]


def publish(model: Emu3VQVAE, directory: Path) -> None:
    with HubWriter(directory, model.hub_layout(), 10**9) as writer:
        for name, tensor in persistent_tensors(model):
            writer.write(name, tensor)


@pytest.fixture(scope="module", params=SHAPES, ids=["f2", "f4"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Emu3VQVAE, Any]:
    """Ours, and transformers' read from the files that we write."""
    model = small_vqvae(request.param)
    directory = tmp_path_factory.mktemp("hub") / "model"
    publish(model, directory)
    peer, loading = transformers.Emu3VQVAE.from_pretrained(directory, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, peer


def peer_codes(peer: Any, clips_BTCHW: Tensor) -> Tensor:
    sizes = torch.tensor([clips_BTCHW.shape[-2:]] * len(clips_BTCHW))
    images = clips_BTCHW.shape[1] == 1
    codes = peer.encode(clips_BTCHW[:, 0] if images else clips_BTCHW, sizes).image_tokens
    if images:
        return torch.stack(codes)[:, None]
    return torch.stack(list(codes))


def clips(model: Emu3VQVAE, frames: int) -> Tensor:
    side = 4 * model.shape.factor
    count = frames * model.shape.temporal_factor if frames else 1
    return pixels(2, count, 3, side, side + model.shape.factor)


@pytest.mark.parametrize("frames", [0, 2], ids=["image", "clip"])
def test_codes_are_equal(both: tuple[Emu3VQVAE, Any], frames: int) -> None:
    model, peer = both
    given = clips(model, frames)
    codes = model.encode(given)
    assert codes.shape == (2, max(frames, 1), 4, 5)
    assert len(codes.unique()) > 10
    assert torch.equal(codes, peer_codes(peer, given))


@pytest.mark.parametrize("frames", [0, 1, 2], ids=["image", "short clip", "clip"])
def test_decoded_pixels_are_equal(both: tuple[Emu3VQVAE, Any], frames: int) -> None:
    model, peer = both
    codes = torch.randint(64, (2, max(frames, 1), 4, 5), generator=torch.Generator().manual_seed(1))
    ours = model.decode_clip(codes) if frames == 1 else model.decode(codes)
    theirs = peer.decode(codes if frames else codes[:, 0])
    assert ours.shape[1] == (frames * model.shape.temporal_factor or 1)
    torch.testing.assert_close(ours if frames else ours[:, 0], theirs, atol=1e-5, rtol=0)


def peer_reconstruction(peer: Any, clips_BTCHW: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Pixels through transformers' parts with the straight-through gradient, and the losses of the codes."""
    images = clips_BTCHW.shape[1] == 1
    frames = clips_BTCHW.repeat(1, factor, 1, 1, 1) if images else clips_BTCHW
    z_BtDhw = peer.quant_conv(peer.encoder(frames).permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
    codes_BthwD = peer.quantize.embedding(peer.quantize(z_BtDhw))
    codes_BtDhw = codes_BthwD.permute(0, 1, 4, 2, 3)
    loss = (codes_BtDhw - z_BtDhw.detach()).square().mean() + 0.25 * (
        codes_BtDhw.detach() - z_BtDhw
    ).square().mean()
    values = z_BtDhw + (codes_BtDhw - z_BtDhw).detach()
    after = peer.post_quant_conv(values.permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
    out = peer.decoder(after, values)
    out = out.reshape(len(clips_BTCHW), -1, *out.shape[1:])
    return (out[:, :1] if images else out), loss


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("frames", [0, 2], ids=["image", "clip"])
def test_the_gradients_of_a_training_step_are_equal(
    both: tuple[Emu3VQVAE, Any], frames: int, training: bool
) -> None:
    """Running statistics are compared too: in training batch norms move them."""
    model, peer = both
    given = clips(model, frames)
    states = [{k: v.clone() for k, v in part.state_dict().items()} for part in both]
    try:
        model.train(training), peer.train(training)
        output = model(given)
        ours = output.reconstruction_BTCHW
        rows = output.quantized.indices_N.numel()
        (ours.sub(given).square().mean() + output.quantized.loss_sum / rows).backward()
        theirs, loss = peer_reconstruction(peer, given, model.shape.temporal_factor)
        (theirs.sub(given).square().mean() + loss).backward()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        compare_gradients(model, peer)
        layout = model.hub_layout()
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, peer.get_buffer(layout.to_hub(name)), atol=1e-6, rtol=1e-6)
    finally:
        for part, state in zip(both, states, strict=True):
            part.zero_grad()
            part.load_state_dict(state)
            part.eval()


def compare_gradients(model: Emu3VQVAE, peer: nn.Module) -> None:
    """Each within 1e-4 of the largest entry: those of norms are sums over thousands of terms that cancel."""
    layout = model.hub_layout()
    for name, parameter in model.named_parameters():
        found = peer.get_parameter(layout.transformers_name(name)).grad
        assert parameter.grad is not None, name
        assert found is not None, name
        found = found.reshape(parameter.shape)
        scale = max(float(found.abs().max()), 1e-3)
        assert float((parameter.grad - found).abs().max()) < 1e-4 * scale, name


def test_files_that_transformers_writes_are_read(both: tuple[Emu3VQVAE, Any], tmp_path: Path) -> None:
    model, peer = both
    peer.save_pretrained(tmp_path / "theirs")
    with torch.device("meta"):
        read = emu3_vqvae_from_hub(tmp_path / "theirs")
    shapes = {name: tensor.shape for name, tensor in persistent_tensors(read)}
    materialize(read, HubReader(tmp_path / "theirs", read.hub_layout(), shapes), torch.device("cpu"))
    assert read.shape == model.shape
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name


def test_the_config_holds_what_transformers_writes(both: tuple[Emu3VQVAE, Any]) -> None:
    model, peer = both
    theirs = json.loads(peer.config.to_json_string(use_diff=False))
    ours: Callable[[str], Any] = model.hub_layout().hub_config().get
    for key in ("codebook_size", "embed_dim", "latent_channels", "channel_multiplier", "hidden_size"):
        assert ours(key) == theirs[key]
