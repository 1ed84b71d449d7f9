"""Adapters between us and peft on transformers' Aria, both ways, and merged models."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.models.adapter_files import AdapterReader, read_lora_config, whole
from cantata.models.aria import Aria
from cantata.models.hub import HubWriter
from cantata.models.lora import LoRAConfig, apply_lora
from cantata.models.merge import MergedWeights
from cantata.tools.compared import LOGITS_BOUND, relative_error
from cantata.tools.verify import pack, synthetic_samples, transformers_inputs
from tests.models.adapters import LINEARS, Base, lora, published, value_of, write
from tests.models.aria.small import small_aria

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ATTENTION = ["text.layers.*.self_attn.*"]

OURS = {
    "everything": lora(),
    "experts": lora(targets=["*.experts.*"], dropout=0.05),
    "first matrix of experts, ranks": lora(targets=["*.experts.fc1", "head"], ranks={"*.0.*": 2, "head": 3}),
    "second matrix of experts": lora(targets=["*.experts.fc2"]),
    "attention, dropout": lora(targets=ATTENTION, dropout=0.05, alpha=8.5),
    "rslora, ranks": lora(rslora=True, ranks={"*.q_proj": 2, "*.experts.fc1": 3, "text.embed_tokens": 1}),
    "dora": lora(dora=True, targets=[*ATTENTION, "*.shared_experts.*", "vision.embeddings.patch*", *LINEARS]),
    "saved in full": lora(
        targets=["*.q_proj"],
        modules_to_save=["head.*", "*.router.weight", "*.experts.fc2", "text.embed_tokens.*"],
    ),
    "a part of a projector saved": lora(targets=["*.experts.*"], modules_to_save=["projector.query"]),
}

THEIRS: dict[str, dict[str, Any]] = {
    "everything": {
        "target_modules": r".*(q_proj|_experts\.\w+_proj|linear_\w+|fc\d|_embedding|embed_tokens|lm_head)",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"lm_head": 2, "gate_up_proj": 3},
    },
    "one matrix of experts": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "dora": {"target_modules": ["k_proj", "patch_embedding", "linear"], "use_dora": True, "use_rslora": True},
    "saved in full": {
        "target_modules": ["o_proj"],
        "modules_to_save": ["experts", "lm_head", "post_layernorm"],
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return published(tmp_path_factory.mktemp("base") / "hub")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return published(tmp_path_factory.mktemp("tied") / "hub", tie_word_embeddings=True)


@torch.no_grad()
def our_logits(model: Aria, base: Base) -> Tensor:
    found = model(pack(synthetic_samples(base.layout, 3), base.layout), with_logits=True).logits_TV
    assert found is not None
    return found


@torch.no_grad()
def their_logits(model: Any, base: Base) -> Tensor:
    samples = synthetic_samples(base.layout, 3)
    return torch.cat([model(**transformers_inputs(sample, base.layout)).logits[0] for sample in samples])


def loaded_by_peft(base: Base, folder: Path) -> Any:
    """Nothing of the file may be left over, and nothing that it should hold may be missing."""
    model = peft.PeftModel.from_pretrained(base.transformers(), folder)
    result = model.load_adapter(folder, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return model.eval()


def assert_equal(ours: Tensor, theirs: Tensor, base_logits: Tensor) -> None:
    assert relative_error(ours, theirs, theirs) < LOGITS_BOUND
    assert relative_error(theirs, base_logits, theirs) > 1e-3


def assert_merged_alike(base: Base, model: Aria, config: LoRAConfig, theirs: Any) -> None:
    merged = MergedWeights(model, base.layout, config, base.reader(), value_of(model), None)
    parameters = dict(theirs.merge_and_unload().named_parameters())
    for name in merged:
        expected = parameters[base.layout.transformers_name(name)]
        found = merged.read(name)
        assert (found - expected.reshape(found.shape)).abs().max() <= 1e-6, name


def test_merged_ours_in_transformers(base: Base, tmp_path: Path) -> None:
    config = lora(targets=["*"], modules_to_save=["*.router.weight"], dora=True)
    model = base.adapted(config)
    merged = MergedWeights(model, base.layout, config, base.reader(), value_of(model), None)
    with HubWriter(tmp_path / "hub", base.layout, 40_000) as writer:
        for name in merged:
            writer.write(name, merged.read(name))
    theirs = their_logits(replace(base, folder=tmp_path / "hub").transformers(), base)
    assert_equal(our_logits(model, base), theirs, our_logits(small_aria(base.layout), base))


@pytest.mark.parametrize("kind", OURS)
def test_ours_in_peft(kind: str, base: Base, tmp_path: Path) -> None:
    config = OURS[kind]
    model = base.adapted(config)
    write(base, model, config, tmp_path / "adapter")
    theirs = loaded_by_peft(base, tmp_path / "adapter")
    assert_equal(
        our_logits(model, base), their_logits(theirs, base), our_logits(small_aria(base.layout), base)
    )
    assert_merged_alike(base, model, config, theirs)


def test_tied_ours_in_peft(tied: Base, tmp_path: Path) -> None:
    config = lora(targets=["text.embed_tokens", "head", "*.fc2"])
    model = tied.adapted(config)
    write(tied, model, config, tmp_path / "adapter")
    theirs = their_logits(loaded_by_peft(tied, tmp_path / "adapter"), tied)
    assert_equal(our_logits(model, tied), theirs, our_logits(small_aria(tied.layout), tied))


def made_by_peft(base: Base, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    model = peft.get_peft_model(base.transformers(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3) if "magnitude" not in name else parameter.mul_(1.2)
            elif "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif "out_proj.lora_B" in name:
                parameter.zero_()
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_here(kind: str, base: Base, tmp_path: Path) -> None:
    theirs = made_by_peft(base, tmp_path / "adapter", **THEIRS[kind])
    model = small_aria(base.layout)
    config = read_lora_config(tmp_path / "adapter", base.layout, model)
    before = our_logits(model, base)
    apply_lora(model, config)
    reader = AdapterReader(tmp_path / "adapter", base.layout, model, config, base.reader())
    with torch.no_grad():
        for name in reader:
            parameter = model.get_parameter(name)
            parameter.copy_(reader.read(name, whole(parameter.shape)))
    assert_equal(our_logits(model.eval(), base), their_logits(theirs, base), before)
    assert_merged_alike(base, model, config, theirs)
