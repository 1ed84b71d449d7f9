import numpy as np

from cantata.core.samples import DataError, Sample


def test_reasons_can_be_counted_and_details_read() -> None:
    assert str(DataError("corrupt image", "it ends early")) == "corrupt image (it ends early)"
    assert str(DataError("too long")) == DataError("too long").reason == "too long"


def test_length_is_in_tokens() -> None:
    assert len(Sample("s:0", np.arange(3, dtype=np.int32), np.ones(3, bool), np.zeros(3, np.int8), ())) == 3
