import numpy as np
import pytest
from PIL import Image

from cantata.core.errors import RunError
from cantata.core.samples import Document, Example, Sample
from cantata.data.reading import Augmentation, Drop, Reader
from tests.data.helpers import Letters, Words, source


def reader(**policy: str) -> Reader:
    return Reader(
        {"words": source(Words("words", [5, 40, 8], broken=[2]), **policy)},
        Letters().encode,
        32,
        "data.sources",
    )


def test_a_sample_is_named_after_its_place() -> None:
    sample = reader().read("words", 0)
    assert isinstance(sample, Sample)
    assert sample.key == "words:0"
    assert len(sample) == 5


def test_policies_drop() -> None:
    assert reader().read("words", 1) == Drop("words", "too long", 1)
    assert reader().read("words", 2) == Drop("words", "corrupt image", 2)


def test_policies_raise() -> None:
    strict = reader(on_error="raise", too_long="raise")
    with pytest.raises(
        RunError, match=r"words:1 has 40 tokens, a packed row 32; raise train\.sequence_length"
    ):
        strict.read("words", 1)
    with pytest.raises(RunError, match=r"sample words:2: corrupt image \(number 2\)"):
        strict.read("words", 2)


def test_bugs_name_their_sample_whatever_the_policy() -> None:
    def encode(example: Example, key: str) -> Sample:
        raise ZeroDivisionError("oh")

    with pytest.raises(RunError, match="sample words:0: ZeroDivisionError: oh"):
        Reader(reader().sources, encode, 32, "data.sources").read("words", 0)


def limited(limit: float | None) -> Reader:
    return Reader({"a": source(Words("a", [5]), max_skipped=limit)}, Letters().encode, 32, "data.sources")


def test_a_source_that_passes_its_limit_is_named_with_its_share_and_reason() -> None:
    drops = {"a": {"too long": 7, "corrupt image": 14}}
    limited(None).check_skipped({"a": 100}, drops)
    limited(0.21).check_skipped({"a": 100}, drops)
    limited(0.05).check_skipped({"a": 99}, drops)
    with pytest.raises(RunError) as caught:
        limited(0.2).check_skipped({"a": 100}, drops)
    assert str(caught.value) == (
        "21 of 100 samples of data.sources.a (21.0%) were left out, most often: corrupt image (14); "
        "max_skipped=0.2 allows fewer: mend the data, or raise data.sources.a.max_skipped"
    )


def test_images_are_augmented_by_sample_and_epoch() -> None:
    class Picture(Words):
        def __getitem__(self, index: int) -> Example:
            return Document((Image.new("RGB", (2, 2)), "x"))

    def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))

    def patches(seed: int, index: int, epoch: int) -> bytes:
        pictures = source(Picture("a", [1, 1]), augmentation=Augmentation(noise, seed))
        sample = Reader({"a": pictures}, Letters().encode, 32, "data.sources").read("a", index, epoch)
        assert isinstance(sample, Sample)
        return sample.images[0].patches_PC.tobytes()

    assert patches(1, 0, 0) == patches(1, 0, 0)
    assert len({patches(1, 0, 0), patches(2, 0, 0), patches(1, 1, 0), patches(1, 0, 1)}) == 4
