"""Published checkpoints, streamed both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cantata.core.errors import ConfigError, RunError
from cantata.models import hub
from cantata.models.aria import Aria
from cantata.models.hub import HubReader, HubWriter, load_from_hub, parameter_shapes, save_to_hub
from tests.models.aria.small import small_aria, small_layout

LAYOUT = small_layout()


@pytest.fixture
def model() -> Aria:
    return small_aria(LAYOUT)


def reader(model: Aria, directory: Path) -> HubReader:
    return HubReader(directory, LAYOUT, parameter_shapes(model))


@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 10**9])
def test_there_and_back_bit_for_bit(model: Aria, tmp_path: Path, max_shard_bytes: int) -> None:
    save_to_hub(model, LAYOUT, tmp_path / "hub", max_shard_bytes)
    other = small_aria(LAYOUT, seed=1)
    load_from_hub(other, LAYOUT, tmp_path / "hub")
    for (name, expected), found in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_shards_keep_the_limit_and_the_index_tells_the_truth(model: Aria, tmp_path: Path) -> None:
    save_to_hub(model, LAYOUT, tmp_path / "hub", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "hub" / hub.INDEX).read_text())
    shards = sorted((tmp_path / "hub").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert {key: path.name for path in shards for key in load_file(path)} == index["weight_map"]
    sizes = [sum(t.numel() * 4 for t in load_file(path).values()) for path in shards]
    assert all(size <= 40_000 for size in sizes)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["metadata"]["total_parameters"] * 4 == sum(sizes)


def test_slices_equal_the_whole(model: Aria, tmp_path: Path) -> None:
    save_to_hub(model, LAYOUT, tmp_path / "hub", max_shard_bytes=40_000)
    source = reader(model, tmp_path / "hub")
    for name, index in {
        "text.layers.1.mlp.experts.fc1": (slice(1, 3), slice(0, 32), slice(5, 9)),
        "vision.embeddings.patch_embedding.weight": (slice(4, 9), slice(3, 7)),
        "head.weight": (slice(60, 64),),
    }.items():
        assert torch.equal(source.read(name, index), model.get_parameter(name)[index]), name


def test_names_come_file_by_file(model: Aria, tmp_path: Path) -> None:
    save_to_hub(model, LAYOUT, tmp_path / "hub", max_shard_bytes=40_000)
    weight_map = json.loads((tmp_path / "hub" / hub.INDEX).read_text())["weight_map"]
    files = [weight_map[LAYOUT.to_hub(name)] for name in reader(model, tmp_path / "hub")]
    assert files == sorted(files)
    assert len(files) == len(weight_map)


def test_missing_extra_and_misshapen_keys_are_listed(model: Aria, tmp_path: Path) -> None:
    save_to_hub(model, LAYOUT, tmp_path / "hub", max_shard_bytes=10**9)
    path = tmp_path / "hub" / hub.SINGLE
    tensors = load_file(path)
    del tensors["multi_modal_projector.query"]
    tensors["language_model.model.norm.weight"] = torch.zeros(31)
    tensors |= {f"extra.{i:02d}": torch.zeros(1) for i in range(12)}
    save_file(tensors, path)
    with pytest.raises(ConfigError) as caught:
        reader(model, tmp_path / "hub")
    message = str(caught.value)
    assert "1 missing: multi_modal_projector.query" in message
    assert "12 unexpected: extra.00, extra.01" in message
    assert "extra.09 and 2 more" in message
    assert "extra.10" not in message
    assert "1 misshapen: language_model.model.norm.weight [31] instead of [32]" in message
    assert "\n" not in message


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    other = small_layout(num_hidden_layers=3)
    save_to_hub(small_aria(other), other, tmp_path / "hub", 10**9)
    with pytest.raises(ConfigError, match=r"unexpected: language_model\.model\.layers\.2"):
        reader(small_aria(LAYOUT), tmp_path / "hub")


def test_broken_directories(model: Aria, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        reader(model, tmp_path)
    (tmp_path / hub.SINGLE).write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        reader(model, tmp_path)
    save_to_hub(model, LAYOUT, tmp_path / "hub", max_shard_bytes=40_000)
    shard = min((tmp_path / "hub").glob("*.safetensors"))
    save_file({"a": torch.zeros(1)}, shard)
    with pytest.raises(ConfigError, match="the index names keys that no file holds"):
        reader(model, tmp_path / "hub")
    shard.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        reader(model, tmp_path / "hub")


def test_a_save_that_stops_half_way_leaves_no_checkpoint(model: Aria, tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with HubWriter(tmp_path / "hub", LAYOUT, 1) as writer:
            for name, parameter in list(model.named_parameters())[:3]:
                writer.write(name, parameter)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        stop_half_way()
    assert not (tmp_path / "hub").exists()
    with pytest.raises(ConfigError):
        reader(model, tmp_path / "hub.incomplete")
    save_to_hub(model, LAYOUT, tmp_path / "hub", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]
    reader(model, tmp_path / "hub")


def test_a_full_disk_is_one_line(model: Aria, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(RunError, match="a shard cannot be written"):
        save_to_hub(model, LAYOUT, tmp_path / "hub", 1)
    assert not (tmp_path / "hub").exists()


def test_nothing_is_overwritten(model: Aria, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        save_to_hub(model, LAYOUT, tmp_path / "hub", 10**9)
