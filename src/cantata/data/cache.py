"""Encoded samples on disk, so that each is read, decoded and tokenised once.

A sample is found again only where everything that made it is as it was. The code and its libraries, the
processor and the dataset's settings and own files name the folder, as a digest; the files that one sample
opened besides (its images, clips, documents) stand in its entry with size and time, and are looked at each
time. Files are told apart by path, size and time of change in nanoseconds, not by reading them.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from cantata.core.errors import ConfigError, RunError
from cantata.core.locate import EMBEDDED, asset
from cantata.core.samples import ImagePatches, Processor, Sample
from cantata.core.target import TARGET
from cantata.data.touched import Stat, stat_of, touching

LIBRARIES = ("av", "jinja2", "numpy", "pillow", "pyarrow", "pypdfium2", "tokenizers", "torch")
"""What decodes, resizes, lays out chats and tokenises."""

NO_FILES = frozenset({TARGET, "root", "split", "records", "format"})
"""Arguments of datasets that name no data file, even where a file or folder is called the same. Of `root`, a
folder of media, each sample watches its own."""

BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What reading an entry raises that another hand, a full disk or a crash has spoilt."""


class SampleCache:
    """The samples of one dataset as one processor encodes them.

    An entry is written beside its place and moved there, so any number of processes may share the folder. An
    entry that cannot be read, or whose files have changed, is made again. Samples that cannot be encoded are
    not stored. Nothing is ever removed: the folder may be deleted at any time.

    Args:
        folder: `data.cache`.
        identity: digest of what all samples depend on, from `identify`.

    Raises `ConfigError` where the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder / identity
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache={folder}: {error}") from error

    def sample(self, index: int, key: str, make: Callable[[], Sample]) -> Sample:
        """The sample at `index`, stored or made; `key` becomes its key. Raises what `make` raises, and
        `RunError` where it cannot be stored."""
        path = self.folder / f"{index // 1000:06d}" / f"{index}.npz"
        stored = _load(path, key)
        if stored is not None:
            return stored
        with touching() as files:
            sample = make()
        try:
            _store(path, sample, list(files.values()))
        except OSError as error:
            raise RunError(
                f"data.cache: {path} cannot be written ({error}); make room, or set data.cache=null"
            ) from error
        return sample


def identify(dataset: Mapping[str, Any], size: int, processor: Processor) -> str | None:
    """A digest of what all samples of a dataset depend on; None where it names no file to be known by.

    Args:
        dataset: the config node that builds it.
        size: its number of samples.
        processor: what encodes it.
    """
    files = sorted({stat_of(file) for file in _files(dataset)})
    if not files:
        return None
    digest = hashlib.sha256()
    digest.update(json.dumps([dataset, size, files], sort_keys=True, default=str).encode())
    digest.update(pickle.dumps(processor))
    digest.update(json.dumps([version(name) for name in LIBRARIES]).encode())
    for source in sorted(set(_code(processor))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _code(processor: Processor) -> Iterator[Path]:
    """Our modules that read and encode."""
    data = Path(__file__).parent
    yield from data.rglob("*.py")
    yield from (data.parent / "core").glob("*.py")
    yield from Path(inspect.getfile(type(processor))).parent.glob("*.py")
    bases = [base for base in type(processor).__mro__ if base.__module__.startswith("cantata.models.")]
    yield from (Path(inspect.getfile(base)) for base in bases)


def _files(node: Any) -> Iterator[Path]:
    """Every file that a config node names, by path, glob or folder."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name not in NO_FILES:
                yield from _files(name)
                yield from _files(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _files(value)
    elif isinstance(node, str) and node:
        for found in [asset(node)] if node.startswith(EMBEDDED) else _matches(node):
            yield from (path for path in found.rglob("*") if path.is_file()) if found.is_dir() else (found,)


def _matches(text: str) -> list[Path]:
    expanded = os.path.expanduser(text)
    try:
        return (
            [Path(expanded)]
            if os.path.exists(expanded)
            else [Path(name) for name in glob.glob(expanded, recursive=True)]
        )
    except (OSError, ValueError):
        return []


def _load(path: Path, key: str) -> Sample | None:
    try:
        with np.load(path, allow_pickle=False) as entry:
            files = json.loads(str(entry["files"]))
            if any(stat_of(Path(name)) != (name, size, changed) for name, size, changed in files):
                return None
            sizes_I2, patches_PC, positions_P = entry["images"], entry["patches"], entry["positions"]
            ends = np.cumsum(sizes_I2[:, 0])
            cut = zip(np.split(patches_PC, ends), np.split(positions_P, ends), sizes_I2[:, 1], strict=False)
            images = tuple(ImagePatches(patches, positions, int(count)) for patches, positions, count in cut)
            return Sample(key, entry["ids"], entry["weights"], entry["modalities"], images)
    except BROKEN:
        return None


def _store(path: Path, sample: Sample, files: list[Stat]) -> None:
    path.parent.mkdir(exist_ok=True)
    images = sample.images
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with beside.open("wb") as file:
            np.savez(
                file,
                files=np.array(json.dumps(files)),
                ids=sample.input_ids_T,
                weights=sample.weight_T,
                modalities=sample.modality_ids_T,
                images=np.array(
                    [(len(image.patches_PC), image.num_features) for image in images], dtype=np.int64
                ).reshape(-1, 2),
                patches=np.concatenate(
                    [image.patches_PC for image in images] or [np.zeros((0, 1), np.uint8)]
                ),
                positions=np.concatenate(
                    [image.position_ids_P for image in images] or [np.zeros(0, np.int64)]
                ),
            )
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
