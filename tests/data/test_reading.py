import pytest

from cantata.core.errors import RunError
from cantata.core.samples import Example, Sample
from cantata.data.reading import Drop, Reader
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
