"""Adapters between us and peft on transformers' Mllama, both ways, and merged models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.models.adapter_files import AdapterReader, read_lora_config, whole
from cantata.models.adapter_writer import AdapterWriter
from cantata.models.hub import HubReader, parameter_shapes, save_to_hub
from cantata.models.lora import LoRAConfig, apply_lora, matched
from cantata.models.merge import MergedWeights
from cantata.models.mllama import Masking, Mllama
from cantata.nn.lora import is_factor
from cantata.tools.verify import LOGITS_BOUND, pack, relative_error, synthetic_samples, transformers_inputs
from tests.models.adapters import lora
from tests.models.mllama.small import small_layout, small_mllama

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

LAYOUT = small_layout()
SAMPLES = synthetic_samples(LAYOUT, 3)
EVERYTHING = ["text.*", "head", "vision.*", "projector"]

OURS = {
    "everything": lora(targets=EVERYTHING),
    "the decoder, as the experiment has it": lora(targets=["text.layers.*"]),
    "cross attention, dora": lora(targets=["*.cross_attn.*", "vision.embeddings.patch*"], dora=True),
    "saved in full": lora(targets=["*.q_proj"], modules_to_save=["projector.*", "*.cross_attn.q_norm.*"]),
}
THEIRS: dict[str, dict[str, Any]] = {
    "everything": {
        "target_modules": r".*(q_proj|up_proj|fc\d|patch_embedding|embed_tokens|lm_head|projector)",
        "rank_pattern": {"lm_head": 2},
    },
    "dora": {"target_modules": ["cross_attn.k_proj", "patch_embedding"], "use_dora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "hub"
    save_to_hub(base_model(), LAYOUT, path, 10**9)
    return path


def base_model() -> Mllama:
    return small_mllama(LAYOUT, Masking.transformers)


def reader(folder: Path) -> HubReader:
    return HubReader(folder, LAYOUT, parameter_shapes(base_model()))


def adapted(config: LoRAConfig) -> Mllama:
    """With random factors, and with what is saved in full moved off its base values."""
    model = base_model()
    apply_lora(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if is_factor(name):
                parameter.copy_(0.1 * noise)
            elif parameter.requires_grad:
                parameter.add_(0.1 * noise)
    return model.eval()


def value_of(model: Mllama) -> Any:
    def read(name: str) -> Tensor:
        return model.get_parameter(name).detach()

    return read


def their_base(folder: Path) -> Any:
    return transformers.MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def our_logits(model: Mllama) -> Tensor:
    found = model(pack(SAMPLES, LAYOUT), with_logits=True).logits_TV
    assert found is not None
    return found


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return torch.cat([model(**transformers_inputs(sample, LAYOUT)).logits[0] for sample in SAMPLES])


def assert_equal(model: Mllama, config: LoRAConfig, theirs: Any, folder: Path) -> None:
    """The same logits, which are not the base's; and the same weights once merged."""
    ours, expected = our_logits(model), their_logits(theirs)
    assert relative_error(ours, expected, expected) < LOGITS_BOUND
    assert relative_error(expected, our_logits(base_model()), expected) > 1e-3
    merged = MergedWeights(model, LAYOUT, config, reader(folder), value_of(model), None)
    parameters = dict(theirs.merge_and_unload().named_parameters())
    for name in merged:
        found, wanted = merged.read(name), parameters[LAYOUT.transformers_name(name)]
        assert (found - wanted.reshape(found.shape)).abs().max() <= 1e-6, name


@pytest.mark.parametrize("kind", OURS)
def test_ours_in_peft(kind: str, folder: Path, tmp_path: Path) -> None:
    """Nothing of the file may be left over, and nothing that it should hold may be missing."""
    config = OURS[kind]
    model = adapted(config)
    (tmp_path / "adapter").mkdir()
    AdapterWriter(model, LAYOUT, config, str(folder)).write(tmp_path / "adapter", value_of(model), None)
    theirs = peft.PeftModel.from_pretrained(their_base(folder), tmp_path / "adapter")
    result = theirs.load_adapter(tmp_path / "adapter", "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert_equal(model, config, theirs.eval(), folder)


def test_the_decoder_has_adapters_in_layers_of_both_kinds() -> None:
    (line,) = matched(adapted(OURS["the decoder, as the experiment has it"]))
    # Seven linear layers in each of five.
    assert line.targets == 5 * 7


@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_here(kind: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **THEIRS[kind])
    theirs = peft.get_peft_model(their_base(folder), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.2 if "magnitude" in name else 0.3)
    with warnings.catch_warnings(action="ignore"):
        theirs.save_pretrained(tmp_path / "adapter")
    model = base_model()
    own = read_lora_config(tmp_path / "adapter", LAYOUT, model)
    apply_lora(model, own)
    found = AdapterReader(tmp_path / "adapter", LAYOUT, model, own, reader(folder))
    with torch.no_grad():
        for name in found:
            parameter = model.get_parameter(name)
            parameter.copy_(found.read(name, whole(parameter.shape)))
    assert_equal(model.eval(), own, theirs, folder)
