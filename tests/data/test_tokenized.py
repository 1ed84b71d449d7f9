import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, Document, Example, Message
from cantata.data.split import Split, split_indices
from cantata.data.tokenized import SCHEMA, Order, TokenizedImages, from_record, to_record

GRID = np.arange(6).reshape(1, 2, 3)
CLIP = np.arange(8).reshape(2, 2, 2)


def folder(path: Path, examples: list[Example], shard_size: int = 4) -> Path:
    """As `cantata tokenize` leaves it; of index 2 nothing could be read."""
    shards = range(0, len(examples), shard_size)
    for number, start in enumerate(shards):
        file = path / "a" / f"{number:05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        records = [
            to_record(index, examples[index], [GRID + index])
            for index in range(start, min(start + shard_size, len(examples)))
            if index != 2
        ]
        parquet.write_table(arrow.Table.from_pylist(records, schema=SCHEMA), file)
    described = {"samples": len(examples), "shards": len(shards)}
    (path / "codes.json").write_text(json.dumps({"tokenizer": "x", "sources": {"a": described}}))
    return path


def examples(count: int = 30) -> list[Example]:
    return [Document((Codes(GRID), f"number {index}")) for index in range(count)]


def read(
    path: Path, order: Order = Order.as_is, split: Split = Split.all, share: float = 0.0
) -> TokenizedImages:
    return TokenizedImages(str(path), "a", order, split, share)


@pytest.mark.parametrize(
    "example",
    [
        Document((Codes(GRID), "text", Codes(CLIP))),
        Document(("ä text",)),
        Chat((Message("user", (Codes(GRID), "what?"), 0.5), Message("assistant", ("that", Codes(CLIP))))),
    ],
)
def test_an_example_comes_back(example: Example) -> None:
    messages = example.messages if isinstance(example, Chat) else (example,)
    grids = [part.codes_thw for one in messages for part in one.parts if isinstance(part, Codes)]
    found = from_record(json.loads(json.dumps(to_record(3, example, grids))))
    assert repr(found) == repr(example)


def test_examples_in_order_over_the_shards(tmp_path: Path) -> None:
    data = pickle.loads(pickle.dumps(read(folder(tmp_path, examples()))))
    assert len(data) == 29
    numbers = [index for index in range(30) if index != 2]
    for place, index in enumerate(numbers):
        codes, text = data[place].parts
        assert text == f"number {index}"
        assert np.array_equal(codes.codes_thw, GRID + index)


def test_what_is_held_out_is_what_the_source_holds_out(tmp_path: Path) -> None:
    path = folder(tmp_path, examples())
    for split in (Split.train, Split.held_out):
        data = read(path, split=split, share=0.3)
        wanted = [index for index in split_indices(30, split, 0.3) if index != 2]
        assert [data[place].parts[1] for place in range(len(data))] == [f"number {n}" for n in wanted]


def test_the_order_of_text_and_image(tmp_path: Path) -> None:
    path = folder(tmp_path, [*examples(3), Document((Codes(GRID),))])
    kinds = {order: [type(part) for part in read(path, order)[0].parts] for order in Order}
    assert kinds == {
        Order.as_is: [Codes, str],
        Order.text_first: [str, Codes],
        Order.image_first: [Codes, str],
    }
    with pytest.raises(DataError, match="no text beside the image"):
        read(path, Order.text_first)[2]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        read(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"holds no readable codes\.json; make it with cantata tokenize"):
        read(tmp_path)
    path = folder(tmp_path, examples())
    with pytest.raises(ConfigError, match="no source b; known: a"):
        TokenizedImages(str(path), "b", Order.as_is, Split.all, 0.0)
    (path / "a" / "00003.parquet").unlink()
    with pytest.raises(ConfigError, match=r"is unfinished: 00003\.parquet of a"):
        read(path)


def test_what_is_no_folder_of_codes(tmp_path: Path) -> None:
    path = folder(tmp_path, examples())
    (path / "a" / "00003.parquet").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"00003\.parquet is no shard of codes .*; remove it and run"):
        read(path)
    (path / "codes.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"codes\.json names no sources; make it with cantata tokenize"):
        read(path)
