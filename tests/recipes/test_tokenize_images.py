"""The recipe that turns images into codes: what it makes, when it makes it again, and what it leaves out."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from cantata.core.samples import Chat, Codes, Document
from cantata.data.collate.pixels import ImageCollator, visual_parts
from cantata.data.sources import CaptionedImages
from cantata.data.split import Split
from cantata.data.tokenized import Order, TokenizedImages, read_manifest
from cantata.tools.open_tokenizer import open_tokenizer
from cantata.train.reconstruction import normalise
from tests.recipes.runner import SMALL_EMA, start, tokenize, torchrun
from tests.recipes.test_pretrain import finish
from tests.tools.test_open_tokenizer import make_tokenizer

CPU = torch.device("cpu")
SOME = ("data.sources.emoji.dataset.split=held_out", "data.sources.emoji.dataset.held_out_share=0.02")
"""Of the emoji 45."""
FEW = (*SOME, "shard_size=16", "batch_size=8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tokenizer") / "run"
    make_tokenizer(run, *SMALL_EMA)
    return run


@pytest.fixture(scope="module")
def codes(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 emoji in shards of 16."""
    out = tmp_path_factory.mktemp("codes") / "codes"
    assert tokenize(out, tokenizer, *FEW) == 0
    return out


def shards(out: Path, source: str = "emoji") -> list[Path]:
    return sorted((out / source).iterdir())


def read(out: Path, source: str = "emoji") -> TokenizedImages:
    return TokenizedImages(str(out), source, Order.as_is, Split.all, 0.0)


def test_codes_are_those_of_each_image_alone(codes: Path, tokenizer: Path) -> None:
    model = open_tokenizer(tokenizer, CPU).model
    source = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", Split.held_out, 0.02)
    found = read(codes)
    assert len(found) == len(source) == 45
    collator = ImageCollator([(16, 16)], 1, model.grid)
    for index in range(45):
        [image] = visual_parts(source[index])
        pixels = torch.from_numpy(collator.pixels(image))[None]
        wanted = model.encode(normalise(pixels))[0].numpy()
        example = found[index]
        assert isinstance(example, Document)
        texts = [part for part in example.parts if isinstance(part, str)]
        assert texts == [part for part in source[index].parts if isinstance(part, str)]
        [made] = [part for part in example.parts if isinstance(part, Codes)]
        assert made.codes_thw.shape == (1, 4, 4)
        assert np.array_equal(made.codes_thw, wanted)


def test_what_made_the_codes_stands_beside_them(codes: Path, tokenizer: Path) -> None:
    found = read_manifest(codes)
    assert found["tokenizer"] == open_tokenizer(tokenizer, CPU).digest
    assert (found["num_codes"], found["num_codebooks"], found["frames"]) == (32, 1, 1)
    assert found["sizes"] == [[16, 16]]
    assert found["sources"]["emoji"]["samples"] == 45
    assert [path.name for path in shards(codes)] == ["00000.parquet", "00001.parquet", "00002.parquet"]


def test_only_a_missing_shard_is_made_again(
    codes: Path, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codes"
    shutil.copytree(codes, out)
    kept, lost, last = shards(out)
    content = lost.read_bytes()
    lost.unlink()
    # Were they made again, these would be other bytes.
    table = parquet.read_table(kept)
    parquet.write_table(table.slice(0, 3), kept)
    before = kept.read_bytes(), last.read_bytes()
    assert tokenize(out, tokenizer, *FEW) == 0
    assert (kept.read_bytes(), last.read_bytes()) == before
    assert lost.read_bytes() == content
    assert "45 examples in 3 shards; 16 made now" in capfd.readouterr().out


def test_a_folder_is_of_one_tokenizer_size_and_source(
    codes: Path, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "other", *SMALL_EMA, seed=4)
    files = {path: path.read_bytes() for path in codes.rglob("*") if path.is_file()}
    cases = {
        "tokenizer": (tmp_path / "other", FEW),
        "sizes": (tokenizer, (*FEW, "collator.sizes=[[32,16]]")),
        "shard_size": (tokenizer, (*FEW, "shard_size=17")),
        "sources": (tokenizer, (*FEW, "data.sources.emoji.dataset.held_out_share=0.03")),
    }
    for name, (given, overrides) in cases.items():
        assert tokenize(codes, given, *overrides) == 2
        error = capfd.readouterr().err
        assert error.splitlines()[-1].startswith(f"error: {codes} holds codes of another {name}; ")
    assert {path: path.read_bytes() for path in codes.rglob("*") if path.is_file()} == files


def test_a_folder_takes_one_launch_at_a_time(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    holder = "import sys; from pathlib import Path; from cantata.train.run_lock import RunLock; "
    code = holder + "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "codes")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert tokenize(tmp_path / "codes", tokenizer, *FEW) == 2
        other.communicate()
    assert "is in use by pid" in capfd.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "codes").glob("*/*.parquet"))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_share_the_shards_and_make_the_same_files(
    codes: Path, tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes"
    given = (f"tokenizer={tokenizer}", "collator.sizes=[[16,16]]", *FEW)
    finish(start(torchrun(2), out, *given, stage="tokenize"))
    assert [path.read_bytes() for path in shards(out)] == [path.read_bytes() for path in shards(codes)]


def test_an_image_that_cannot_be_read_is_left_out_and_counted(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    captioned(tmp_path, 5, broken=(1, 3))
    given = (*own(tmp_path / "list.jsonl", "cantata.data.sources.ImageTextFile"), "shard_size=4")
    assert tokenize(tmp_path / "codes", tokenizer, *given) == 0
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("left out")] == ["left out 2: corrupt image"]
    found = read(tmp_path / "codes", "own")
    assert [text_of(found[index]) for index in range(len(found))] == ["number 0", "number 2", "number 4"]
    # The same command again counts them again, though it reads nothing.
    assert tokenize(tmp_path / "codes", tokenizer, *given) == 0
    again = capfd.readouterr().out
    assert "0 made now" in again
    assert [line for line in again.splitlines() if "left out" in line] == [
        line for line in out.splitlines() if "left out" in line
    ]


def test_an_error_in_a_worker_is_one_line_and_leaves_no_process(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    captioned(tmp_path, 3, broken=(1,))
    source = own(tmp_path / "list.jsonl", "cantata.data.sources.ImageTextFile")
    given = (*source, "data.sources.own.on_error=raise", "data.num_workers=1")
    assert tokenize(tmp_path / "codes", tokenizer, *given) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: sample own:1: corrupt image")
    assert line.endswith("mend it, or set data.sources.own.on_error=skip")
    # A worker ignores signals: this process would wait for it at its end.
    assert not multiprocessing.active_children()


def test_too_many_left_out_are_counted_over_shards(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    captioned(tmp_path, 120, broken=tuple(range(0, 120, 10)))
    source = own(tmp_path / "list.jsonl", "cantata.data.sources.ImageTextFile")
    given = (*source, "data.sources.own.max_skipped=0.05", "shard_size=50")
    assert tokenize(tmp_path / "codes", tokenizer, *given) == 1
    assert "10 of 100 samples of data.sources.own (10.0%) were left out" in capfd.readouterr().err
    # What was judged is not there, so that mended data is read.
    assert [path.name for path in shards(tmp_path / "codes", "own")] == ["00000.parquet"]


def test_a_file_that_is_no_shard_is_one_line(
    codes: Path, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(codes, tmp_path / "codes")
    shards(tmp_path / "codes")[1].write_bytes(b"cut")
    assert tokenize(tmp_path / "codes", tokenizer, *FEW) == 2
    assert "00001.parquet is no shard of codes; remove it" in capfd.readouterr().err


def test_several_images_of_a_chat_keep_their_places(tokenizer: Path, tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (20, 20), (index * 60, 0, 90)).save(tmp_path / f"{index}.png")
    chats = [
        {
            "messages": [
                {"role": "user", "content": "<image> or <image>?"},
                {"role": "assistant", "content": "the first"},
                {"role": "user", "content": "And <image>?"},
                {"role": "assistant", "content": "neither"},
            ],
            "images": ["0.png", "1.png", third],
        }
        for third in ("2.png", "3.png")
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    given = (
        "data=images",
        "data.num_workers=0",
        f"data.sources.images.dataset.path={tmp_path / 'chats.jsonl'}",
        "data.sources.images.dataset.split=all",
        "~data.held_out.images",
        "batch_size=2",
    )
    assert tokenize(tmp_path / "codes", tokenizer, *given) == 0
    found = read(tmp_path / "codes", "images")
    model = open_tokenizer(tokenizer, CPU).model
    collator = ImageCollator([(16, 16)], 1, model.grid)
    for place, third in enumerate((2, 3)):
        chat = found[place]
        assert isinstance(chat, Chat)
        assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
        parts = visual_parts(chat)
        for part, number in zip(parts, (0, 1, third), strict=True):
            with Image.open(tmp_path / f"{number}.png") as image:
                pixels = torch.from_numpy(collator.pixels(image.convert("RGB")))[None]
            assert isinstance(part, Codes)
            assert np.array_equal(part.codes_thw, model.encode(normalise(pixels))[0].numpy())


def test_a_tokenizer_is_wanted_and_must_be_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert tokenize(tmp_path / "codes", tmp_path / "nothing") == 2
    assert "nothing: no such folder; give a run of cantata vq" in capfd.readouterr().err
    assert not (tmp_path / "codes").exists()


def test_sizes_that_the_tokenizer_cannot_take_are_refused(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(tmp_path / "codes", tokenizer, "collator.sizes=[[16,18]]") == 2
    assert "both sides must be multiples of 4" in capfd.readouterr().err
    assert not (tmp_path / "codes").exists()


def captioned(folder: Path, count: int, broken: tuple[int, ...]) -> None:
    """`list.jsonl` with images, of which some are cut off."""
    lines = []
    for index in range(count):
        path = folder / f"{index}.png"
        Image.new("RGB", (20, 20), (index * 40, 10, 10)).save(path)
        if index in broken:
            path.write_bytes(path.read_bytes()[:40])
        lines.append(json.dumps({"text": f"number {index}", "image": path.name}) + "\n")
    (folder / "list.jsonl").write_text("".join(lines))


def own(path: Path, target: str) -> tuple[str, ...]:
    """Overrides that read a file of captioned images instead of the emoji."""
    dataset = f"{{_target_: {target}, path: {path}, split: all, held_out_share: 0.0}}"
    source = f"{{weight: 1.0, on_error: skip, max_skipped: null, augment: null, dataset: {dataset}}}"
    return ("~data.sources.emoji", f"+data.sources.own={source}")


def text_of(example: object) -> str:
    assert isinstance(example, Document)
    [text] = [part for part in example.parts if isinstance(part, str)]
    return text
