"""Pixels to codes and back beside a model: the sizes that it knows, the tokenizer that is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cantata.core.build import build
from cantata.core.config import compose, resolved
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, Document, Message
from cantata.data.code_origin import CodeOrigin
from cantata.data.collate.packed import PackedCollator
from cantata.tools.coded import Coder, reads_pixels
from cantata.tools.open_model import OpenedModel
from cantata.tools.open_tokenizer import open_tokenizer
from cantata.train.reconstruction import normalise
from tests.recipes.runner import SMALL_EMA
from tests.tools.test_open_tokenizer import make_tokenizer

RED = Image.new("RGB", (16, 16), "red")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tokenizer") / "run"
    make_tokenizer(run, *SMALL_EMA)
    return run


@pytest.fixture(scope="module")
def digest(tokenizer: Path) -> str:
    return open_tokenizer(tokenizer, torch.device("cpu")).digest


def model(codes: CodeOrigin | None, codebook_size: int = 32) -> OpenedModel:
    given = ["experiment=emu3_mini", f"collator.processor.tokens.codebook_size={codebook_size}"]
    collator: PackedCollator = build(resolved(compose("pretrain", given).node)["collator"])
    nothing: Any = None
    return OpenedModel(nothing, collator, nothing, 64, "needs a tokenizer", [], codes)


def test_sizes_are_those_of_the_codes_or_as_asked(tokenizer: Path, digest: str) -> None:
    opened = model(CodeOrigin(digest, [[16, 16], [8, 16], [32, 8]]))
    coder = Coder(tokenizer, opened, None)
    assert coder.collator.sizes == [(16, 16), (8, 16), (32, 8)]
    assert coder.grid == (4, 4)
    assert Coder(tokenizer, opened, (8, 24)).grid == (2, 6)
    with pytest.raises(ConfigError, match="add --size ROWSxCOLUMNS"):
        Coder(tokenizer, model(None), None)


def test_pixels_become_codes_and_codes_pixels(tokenizer: Path, digest: str) -> None:
    coder = Coder(tokenizer, model(CodeOrigin(digest, [[16, 16]])), None)
    own = open_tokenizer(tokenizer, torch.device("cpu")).model
    pixels = torch.from_numpy(np.asarray(RED).transpose(2, 0, 1).copy())[None, None]
    wanted = own.encode(normalise(pixels))
    assert np.array_equal(coder.encode(RED).codes_thw, wanted[0].numpy())
    picture = np.asarray(coder.picture(wanted[0, 0].numpy()))
    values = (own.decode(wanted)[0, 0].clamp(-1, 1) * 127.5 + 127.5).round().byte()
    assert np.array_equal(picture, values.permute(1, 2, 0).numpy())


def test_another_tokenizer_or_another_number_of_codes_is_refused(tokenizer: Path, digest: str) -> None:
    with pytest.raises(ConfigError, match=r"is another tokenizer \(\w{12}\) than the one .* \(elsewhere\)"):
        Coder(tokenizer, model(CodeOrigin("elsewhere", [[16, 16]])), None)
    with pytest.raises(ConfigError, match="has 1 x 32 codes, and the model one of 1,024 at each place"):
        Coder(tokenizer, model(None, codebook_size=1024), (16, 16))


def test_a_tokenizer_with_several_codes_a_place_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "run", "quantizer@model.quantizer=residual")
    with pytest.raises(ConfigError, match="has 2 x 1,024 codes"):
        Coder(tmp_path / "run", model(None, codebook_size=1024), (16, 16))


def test_a_model_that_reads_pixels_has_no_use_for_one(tokenizer: Path) -> None:
    aria = resolved(compose("pretrain", ["experiment=aria_mini"]).node)["collator"]
    nothing: Any = None
    opened = OpenedModel(nothing, build(aria), nothing, 64, "", [])
    with pytest.raises(ConfigError, match="AriaProcessor makes no tokens of images; leave out --tokenizer"):
        Coder(tokenizer, opened, (16, 16))


def test_prompts_with_images_become_prompts_with_codes(tokenizer: Path, digest: str) -> None:
    opened = model(CodeOrigin(digest, [[16, 16]]))
    coder = Coder(tokenizer, opened, None)
    reading = reads_pixels(opened, coder)
    assert not reading.no_images
    inner, coded = opened.collator.processor, coder.encode(RED)
    assert isinstance(coded, Codes)
    pairs: list[tuple[Any, Any]] = [
        (Document((RED, "red")), Document((coded, "red"))),
        (Chat((Message("user", (RED, "What?")),)), Chat((Message("user", (coded, "What?")),))),
    ]
    for given, wanted in pairs:
        found = reading.collator.processor.encode_prompt(given)
        assert np.array_equal(found.input_ids_T, inner.encode_prompt(wanted).input_ids_T)
    assert reading.collator.processor.stop_token_ids == inner.stop_token_ids
