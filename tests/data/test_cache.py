import json
import multiprocessing
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import DataError, Sample
from cantata.data import cache
from cantata.data.cache import SampleCache, identify
from cantata.data.reading import Drop, Reader
from cantata.data.sources import ImageTextFile
from cantata.data.split import Split
from tests.data.helpers import mini_processor, source

SETTINGS = {"_target_": "cantata.data.sources.ImageTextFile", "split": "all", "held_out_share": 0.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A sample with an image, one of text, one whose image is broken."""
    paint(tmp_path / "a.png", "red")
    (tmp_path / "broken.png").write_bytes(b"none")
    lines = [{"text": "one", "image": "a.png"}, {"text": "two"}, {"text": "three", "image": "broken.png"}]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def paint(path: Path, colour: str) -> None:
    Image.new("RGB", (64, 48), colour).save(path)


class Counting(ImageTextFile):
    reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def reader(data: Path, processor: Any = None, **settings: Any) -> Reader:
    processor = processor or mini_processor()
    dataset = Counting(str(data / "data.jsonl"), Split.all, 0.0)
    node = SETTINGS | {"path": str(data / "data.jsonl")} | settings
    identity = identify(node, len(dataset), processor)
    assert identity is not None
    cached = source(dataset, cache=SampleCache(data / "cache", identity))
    return Reader({"s": cached}, processor.encode, 512, "data.sources")


def reads(of: Reader) -> int:
    return of.sources["s"].dataset.reads  # type: ignore[attr-defined]


def read(of: Reader, index: int) -> Sample:
    sample = of.read("s", index)
    assert isinstance(sample, Sample)
    return sample


def assert_equal(left: Sample, right: Sample) -> None:
    assert left.key == right.key
    for name in ("input_ids_T", "weight_T", "modality_ids_T"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other), name
    assert len(left.images) == len(right.images)
    for one, other in zip(left.images, right.images, strict=True):
        assert np.array_equal(one.patches_PC, other.patches_PC)
        assert one.patches_PC.dtype == other.patches_PC.dtype
        assert np.array_equal(one.position_ids_P, other.position_ids_P)
        assert one.num_features == other.num_features


def test_a_second_run_reads_the_same_from_the_cache(data: Path) -> None:
    first, second = reader(data), reader(data)
    made = [read(first, 0), read(first, 1)]
    for sample in made:
        assert_equal(read(second, int(sample.key[2:])), sample)
    assert (reads(first), reads(second)) == (2, 0)
    assert made[0].images
    assert not made[1].images


def test_what_cannot_be_read_is_not_stored(data: Path) -> None:
    for _ in range(2):
        one = reader(data)
        assert one.read("s", 2) == Drop("s", "corrupt image", 2)
        assert reads(one) == 1
    paint(data / "broken.png", "blue")
    assert read(reader(data), 2).images


def test_a_changed_image_makes_its_sample_anew_and_no_other(data: Path) -> None:
    before = read(reader(data), 0)
    read(reader(data), 1)
    paint(data / "a.png", "green")
    again = reader(data)
    assert not np.array_equal(read(again, 0).images[0].patches_PC, before.images[0].patches_PC)
    read(again, 1)
    assert reads(again) == 1
    (data / "a.png").unlink()
    assert reader(data).read("s", 0) == Drop("s", "missing file", 0)


def test_a_changed_data_file_or_setting_makes_everything_anew(data: Path) -> None:
    read(reader(data), 1)
    for changed in (
        reader(data, held_out_share=0.1),
        reader(data, mini_processor(min_image_size=32)),
        reader(data, mini_processor(tokenizer=str(other_tokenizer(data)))),
    ):
        read(changed, 1)
        assert reads(changed) == 1
    text = (data / "data.jsonl").read_text()
    (data / "data.jsonl").write_text(text.replace("two", "too"))
    os.utime(data / "data.jsonl", ns=(1, 1))
    assert mini_processor().decode(read(reader(data), 1).input_ids_T.tolist()) == "too"


def other_tokenizer(folder: Path) -> Path:
    tokenizer = mini_processor().tokenizer
    tokenizer.add_tokens(["cantata"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("spoil", ["cut", "flip", "empty", "text"])
def test_a_spoilt_entry_is_made_again(data: Path, spoil: str) -> None:
    made = read(reader(data), 0)
    [entry] = (data / "cache").rglob("*.npz")
    raw = bytearray(entry.read_bytes())
    raw[len(raw) // 2] ^= 1
    entry.write_bytes({"cut": raw[:-30], "flip": raw, "empty": b"", "text": b"oh"}[spoil])
    again, third = reader(data), reader(data)
    assert_equal(read(again, 0), made)
    assert_equal(read(third, 0), made)
    assert (reads(again), reads(third)) == (1, 0)


def _read_all(data: Path) -> None:
    one = reader(data)
    for _ in range(20):
        for entry in (data / "cache").rglob("*.npz"):
            entry.unlink(missing_ok=True)
        read(one, 0)


def test_many_processes_share_a_folder(data: Path) -> None:
    workers = [multiprocessing.get_context("fork").Process(target=_read_all, args=(data,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert not list((data / "cache").rglob(".*"))
    read(reader(data), 0)


@pytest.mark.slow
def test_the_identity_is_the_same_in_another_process(data: Path) -> None:
    path = str(data / "data.jsonl")
    program = (
        "from cantata.data.cache import identify; from tests.data.helpers import mini_processor;"
        f"print(identify({{'path': {path!r}}}, 3, mini_processor()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == identify({"path": path}, 3, mini_processor())


NOT_IN_SAMPLES = {"datasets", "filelock", "hydra-core", "omegaconf", "pyyaml", "rich"}
"""What the hashed modules use besides: it carries samples, and makes none."""


def test_every_library_that_makes_samples_is_in_the_identity(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions = packages_distributions()
    imported = {
        distributions[module.partition(".")[0]][0].lower()
        for file in cache._code(mini_processor())
        for module in re.findall(r"^(?:from|import) ([A-Za-z]\w*)", file.read_text(), re.MULTILINE)
        if module not in {*sys.stdlib_module_names, "cantata"}
    }
    assert imported - NOT_IN_SAMPLES == set(cache.LIBRARIES)
    node, processor = {"path": str(data / "data.jsonl")}, mini_processor()
    before = identify(node, 3, processor)
    monkeypatch.setattr(cache, "version", lambda name: "99" if name == "jinja2" else version(name))
    assert identify(node, 3, processor) != before


def test_folders_globs_and_mixes_are_known_by_their_files(data: Path) -> None:
    processor = mini_processor()
    for node in ({"path": str(data)}, {"path": f"{data}/*.jsonl"}, {"datasets": {str(data): 0.5}}):
        before = identify(node, 3, processor)
        assert before == identify(node, 3, processor)
        os.utime(data / "data.jsonl", ns=(before and 5, len(str(node))))
        assert identify(node, 3, processor) != before
    assert identify({"name": "somebody/data", "root": str(data)}, 3, processor) is None


def test_a_folder_that_cannot_be_written(data: Path) -> None:
    (data / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache="):
        SampleCache(data / "file", "x")
    cache = SampleCache(data / "cache", "x")
    cache.folder.rmdir()
    with pytest.raises(RunError, match=r"cannot be written .*data\.cache=null"):
        cache.sample(0, "s:0", lambda: read(reader(data), 1))
    with pytest.raises(DataError):
        cache.sample(0, "s:0", lambda: (_ for _ in ()).throw(DataError("no")))
