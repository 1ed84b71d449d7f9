"""Runs and published folders as models: the weights that lie there, in the dtype asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.samples import Document
from cantata.models.hub import save_to_hub
from cantata.parallel.materialize import RandomInit, persistent_tensors
from cantata.tools.open_model import OpenedModel, load, open_model
from tests.recipes.runner import lora
from tests.tools.test_export import command as export
from tests.tools.test_export import make_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose routers have a bias that no published folder could hold."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    read = RandomInit.read

    def biased(self: RandomInit, name: str, index: tuple[slice, ...]) -> Tensor:
        value: Tensor = read(self, name, index)
        return value + 0.5 if name.endswith("expert_bias_E") else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomInit, "read", biased)
        make_run(folder, "model.text.moe.balance.bias_update_rate=1e-3", steps=(7, 10))
    return folder


def assert_holds(found: nn.Module, expected: nn.Module, dtype: torch.dtype) -> None:
    tensors = dict(persistent_tensors(found))
    for name, tensor in persistent_tensors(expected):
        is_buffer = name.endswith("expert_bias_E")
        assert tensors[name].dtype == (torch.float32 if is_buffer else dtype)
        assert torch.equal(tensors[name], tensor.to(tensors[name].dtype)), name
        assert not tensors[name].requires_grad


def test_a_run_is_its_newest_checkpoint_with_its_buffers(run: Path) -> None:
    opened = open_model(run)
    assert all(parameter.is_meta for parameter in opened.model.parameters())
    assert (opened.max_positions, opened.no_images) == (2048, "")
    model = load(opened, CPU, torch.float32)
    assert not model.training
    assert model.get_parameter("text.embed_tokens.weight").ne(0).any()
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias_E")]
    assert all(bool((bias == 0.5).all()) for bias in biases)
    assert biases
    assert float(next(model.parameters())[0, 0]) == 10
    older = load(open_model(run / "checkpoints/step-00000007"), CPU, torch.bfloat16)
    assert float(next(older.parameters())[0, 0]) == 7
    assert {parameter.dtype for parameter in older.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in older.named_buffers() if "bias" in name} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = make_run(tmp_path / "run")
    assert export(tmp_path / "run", "--to", tmp_path / "hub") == 0
    opened = open_model(tmp_path / "hub")
    assert "how images were read is not known" in opened.no_images
    assert_holds(load(opened, CPU, dtype), expected, dtype)


def test_what_is_neither_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; give a Hugging Face folder"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(
        ConfigError, match=r"no Hugging Face folder \(no config.json\), no complete checkpoint"
    ):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="has model_type='llama'"):
        open_model(tmp_path)


def test_a_folder_of_weights_alone_lacks_a_tokenizer(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run")
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    with pytest.raises(ConfigError, match=r"hub: the folder holds no tokenizer.json"):
        open_model(tmp_path / "hub")


def test_a_checkpoint_of_another_model(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    text = (run / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("num_hidden_layers: 2", "num_hidden_layers: 3"))
    with pytest.raises(ConfigError, match=r"of another model than its config.yaml describes: it lacks"):
        open_model(copy)
    (copy / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config.yaml, which is not there"):
        open_model(copy)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two steps over a published base, whose routers' biases have moved."""
    folder = tmp_path_factory.mktemp("adapted")
    make_run(folder / "base")
    assert export(folder / "base", "--to", folder / "hub") == 0
    weights = (f"model.weights={folder / 'hub'}", "model.text.moe.balance.bias_update_rate=1e-2")
    trained = ("optimizer.lr=0.01", "lora.dropout=0", "lora.modules_to_save=['*.router.weight']")
    assert lora(folder / "run", *weights, *trained, "accuracy.samples=0") == 0
    return folder


def logits(opened: OpenedModel) -> Tensor:
    model = load(opened, CPU, torch.float32)
    sample = opened.collator.encode(Document(("Which group?",)), "s:0")
    batch = opened.collator.collate([opened.collator.row([sample])], len(sample))
    with torch.no_grad():
        found: Tensor = model(batch, with_logits=True).logits_TV
    return found


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within 2e-6 of the largest logit: other sums in fp32, through two layers."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_an_adapter_beside_its_weights_and_merged_into_them(adapted: Path) -> None:
    beside = logits(open_model(adapted / "run"))
    merged = open_model(adapted / "run", merge=True)
    biases = [merged.source.read(n, (slice(None),)) for n in merged.source if n.endswith("expert_bias_E")]
    assert biases
    assert all(bias.any() for bias in biases), "a run's buffers stay"
    assert_near(logits(merged), beside)
    assert not torch.allclose(logits(open_model(adapted / "hub")), beside, atol=1e-3)


def test_an_adapter_in_pefts_format_over_a_published_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "base")
    assert export(tmp_path / "base", "--to", tmp_path / "hub") == 0
    given = (f"model.weights={tmp_path / 'hub'}", "optimizer.lr=0.01", "accuracy.samples=0", "lora.dropout=0")
    assert lora(tmp_path / "run", *given) == 0
    assert export(tmp_path / "run", "--to", tmp_path / "adapter") == 0
    expected = logits(open_model(tmp_path / "run"))
    for merge in (False, True):
        found = open_model(tmp_path / "hub", tmp_path / "adapter", merge=merge)
        assert_near(logits(found), expected)
    assert found.notes == []
    (tmp_path / "hub").rename(tmp_path / "other")
    [note] = open_model(tmp_path / "other", tmp_path / "adapter").notes
    assert "adapter was trained on" in note
    with pytest.raises(ConfigError, match="--merge needs an adapter"):
        open_model(tmp_path / "other", merge=True)
    with pytest.raises(ConfigError, match="--merge needs an adapter"):
        open_model(tmp_path / "base", merge=True)
    with pytest.raises(ConfigError, match="--adapter goes with a Hugging Face folder"):
        open_model(tmp_path / "run", tmp_path / "adapter")
