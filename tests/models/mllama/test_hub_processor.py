"""Tokenizer and processor files: transformers and we read from them what our processor does."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from cantata.core.samples import Chat, Document, Message
from cantata.models.hub import save_to_hub
from cantata.models.mllama import MllamaProcessor
from cantata.models.mllama.hf import MllamaLayout, read_hub_config
from tests.models.aria.mixed import SQUARE, TALL, WIDE
from tests.models.mllama.mixed import mixed_layout, mixed_mllama
from tests.models.mllama.small import small_processor, small_text, small_vision


@pytest.fixture(scope="module")
def processor() -> MllamaProcessor:
    return small_processor()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies beside exported weights."""
    folder = tmp_path_factory.mktemp("published")
    layout = mixed_layout()
    assert layout.write_processor(small_processor(), folder) == []
    return folder


def test_the_written_template_writes_what_the_processor_does(
    processor: MllamaProcessor, published: Path
) -> None:
    templated = small_processor(chat_template=str(published))
    for chat in (
        Chat((Message("user", (SQUARE, "Who?", WIDE)), Message("assistant", ("Romeo.",)))),
        Chat((Message("system", ("Be brief.",)), Message("user", ("So?",)), Message("assistant", ("A",)))),
    ):
        expected, found = processor.encode(chat, "c:0"), templated.encode(chat, "c:0")
        assert found.input_ids_T.tolist() == expected.input_ids_T.tolist()
        assert found.weight_T.tolist() == expected.weight_T.tolist()
        assert len(found.images) == len(expected.images)
        prompt = Chat(chat.messages[:-1])
        expected, found = processor.encode_prompt(prompt), templated.encode_prompt(prompt)
        assert found.input_ids_T.tolist() == expected.input_ids_T.tolist()
    again = pickle.loads(pickle.dumps(templated))
    assert (
        again.encode(chat, "c:0").input_ids_T.tolist() == templated.encode(chat, "c:0").input_ids_T.tolist()
    )


def test_what_is_written_loads_in_transformers(processor: MllamaProcessor, published: Path) -> None:
    """transformers' processor makes the same tokens and pixels of the same prompts."""
    transformers = pytest.importorskip("transformers")
    images: Any = transformers.AutoImageProcessor.from_pretrained(published, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    theirs = transformers.MllamaProcessor(images, tokenizer)
    made = theirs(images=[WIDE, TALL], text="<|img|><|img|>which is wider?", return_tensors="pt")
    ours = processor.encode_prompt(Document((WIDE, TALL, "which is wider?")))
    assert made["input_ids"][0].tolist() == ours.input_ids_T.tolist()
    assert made["aspect_ratio_mask"][0].sum(1).tolist() == [len(i.patches_PC) // 4 for i in ours.images]
    assert tuple(images.image_mean) == small_vision().image_mean


def test_published_image_settings_are_read_back(published: Path, tmp_path: Path) -> None:
    """Mean and deviation lie beside the weights, not in `config.json`."""
    model = mixed_mllama()
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", max_shard_bytes=10**9)
    assert read_hub_config(tmp_path / "hub") != mixed_layout()
    model.hub_layout().write_processor(small_processor(), tmp_path / "hub")
    assert read_hub_config(tmp_path / "hub") == mixed_layout()


def test_of_text_alone_no_image_processor_is_written(tmp_path: Path) -> None:
    layout = MllamaLayout(None, small_text(), 9)
    assert layout.write_processor(small_processor(), tmp_path) == []
    assert not (tmp_path / "preprocessor_config.json").exists()
