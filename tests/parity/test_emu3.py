"""The native Emu3 against transformers': logits, loss, gradients, checkpoints both ways, and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cantata.core.samples import Codes, Document, Sample
from cantata.data.collate import PackedCollator
from cantata.infer.generate import generate
from cantata.infer.image_generation import ImageGenerator
from cantata.infer.sampling import SamplingConfig
from cantata.models.emu3 import Emu3, Emu3TextConfig, emu3_from_hub
from cantata.models.hub import load_from_hub, save_to_hub
from cantata.tools.verify import compare
from tests.data.helpers import Letters
from tests.models.emu3.small import TOKENS, reading_config, small_config, small_emu3, small_processor

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "gqa-untied": small_config(),
    "mha-tied": small_config(
        num_key_value_heads=4, tie_word_embeddings=True, rope_theta=1e6, head_dim=16, rms_norm_eps=1e-3
    ),
}
NEW = 12


class Ids(Letters):
    """Any tokens."""

    pad_token_id = 0
    image_token_id = -1
    patch_values = 0


COLLATOR = PackedCollator(Ids())


def samples(seed: int = 0) -> list[Sample]:
    """Prompts of three lengths."""
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(1, 64, length).astype(np.int32) for length in (9, 4, 17)]
    return [
        Sample(f"s:{i}", ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int8), ())
        for i, ids in enumerate(drawn)
    ]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Emu3TextConfig:
    return CONFIGS[request.param]


def exported(model: Emu3, directory: Path) -> Any:
    """transformers' model of our checkpoint; every key must be found."""
    save_to_hub(model, model.hub_layout(), directory, max_shard_bytes=10_000)
    reference, report = transformers.Emu3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return reference.eval()


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_loss_and_every_gradient(config: Emu3TextConfig, tmp_path: Path, seed: int) -> None:
    model = small_emu3(config, seed)
    checks = list(compare(model, exported(model, tmp_path / "hub"), model.hub_layout(), seed))
    assert len(checks) == 2 + len(list(model.parameters()))
    assert [check for check in checks if not check.passed] == []


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    model = small_emu3(CONFIGS["gqa-untied"])
    reference = exported(model, tmp_path / "hub")
    with torch.no_grad():
        model.text.layers[1].self_attn.k_proj.weight[3] += 1e-3
    assert any(not check.passed for check in compare(model, reference, model.hub_layout(), 0))


def test_checkpoints_both_ways(config: Emu3TextConfig, tmp_path: Path) -> None:
    """Ours through transformers and back is ours again, bit for bit."""
    model = small_emu3(config, seed=3)
    exported(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = emu3_from_hub(tmp_path / "theirs").eval()
    assert again.text_config == config
    load_from_hub(again, again.hub_layout(), tmp_path / "theirs")
    for (name, found), expected in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(written) == {model.hub_layout().to_hub(name) for name, _ in model.named_parameters()}


def test_dropout_is_where_theirs_is(tmp_path: Path) -> None:
    """Their model in training mode has the same mean over many draws; without one of the three it has not."""
    config = small_config(dropout=0.5, num_hidden_layers=1, initializer_range=0.6)
    model = small_emu3(config)
    reference = exported(model, tmp_path / "hub").train()
    ids = torch.from_numpy(samples()[0].input_ids_T).long()
    count = 1600
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = reference(input_ids=ids.expand(count, -1)).logits
        many = [samples()[0]] * count
        row = COLLATOR.row(many)
        ours = model.train()(COLLATOR.collate([row], sum(row.lengths)), with_logits=True).logits_TV
    ours = ours.view(count, len(ids), -1)
    # Of equal means 1.1 is expected; without any one of the three dropouts it is 3 or more.
    difference = (ours.mean(0) - theirs.mean(0)).abs() / (theirs.std(0) / count**0.5)
    assert float(difference.mean()) < 2


@torch.no_grad()
def test_greedy_generation(config: Emu3TextConfig, tmp_path: Path) -> None:
    """With a cache, several prompts at once, against theirs one by one."""
    model = small_emu3(config, seed=1)
    reference = exported(model, tmp_path / "hub")
    expected = []
    for sample in samples(5):
        ids = torch.from_numpy(sample.input_ids_T).long()[None]
        found = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[63],
        )
        expected.append(found[0, ids.shape[1] :].tolist())
    ours = generate(
        model,
        COLLATOR,
        samples(5),
        max_new_tokens=NEW,
        stop_token_ids=(),
        temperature=0.0,
        seed=0,
    )
    assert ours == expected
    assert len({tuple(tokens) for tokens in ours}) == 3


def their_image(model: Any, text: str, size: tuple[int, int], guidance: float) -> list[int]:
    """transformers' guided and constrained generation, up to its end of sequence."""
    height, width = size
    prompt, null = (
        torch.from_numpy(small_processor().encode_image_prompt(one, height, width).input_ids_T).long()[None]
        for one in (text, "")
    )
    visual = list(range(TOKENS.visual_offset, TOKENS.end_of_visual))
    form = [visual] * width + [[TOKENS.eol]]
    form = form * height + [[TOKENS.eof], [TOKENS.eoi], [TOKENS.eos]]
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        negative_prompt_ids=null,
        negative_prompt_attention_mask=torch.ones_like(null),
        guidance_scale=guidance,
        prefix_allowed_tokens_fn=lambda _, ids: form[len(ids) - prompt.shape[1]],
        max_new_tokens=len(form),
        do_sample=False,
        eos_token_id=TOKENS.eos,
        pad_token_id=TOKENS.pad,
    )
    tokens: list[int] = found[0, prompt.shape[1] :].tolist()
    return tokens


@torch.no_grad()
def test_guided_images(tmp_path: Path) -> None:
    """Several sizes and texts in one batch, token for token, and their end as transformers writes it."""
    model = small_emu3(reading_config(initializer_range=0.4))
    reference = exported(model, tmp_path / "hub")
    texts, sizes = ["a red circle", "waves on a shore", "no"], [(2, 3), (1, 2), (3, 1)]
    processor = small_processor()
    generator = ImageGenerator(model, PackedCollator(processor), max_positions=128, max_open=2)
    found = generator.generate(texts, sizes, 3.0, SamplingConfig(1, 0.0, 0, 1.0, 1.0, (), 0))
    for image, text, size in zip(found, texts, sizes, strict=True):
        written = processor.encode(Document((text, Codes(image[None]))), "s").input_ids_T.tolist()
        expected = their_image(reference, text, size, 3.0)
        assert written[-len(expected) :] == expected
