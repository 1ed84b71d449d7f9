import pytest

from cantata.core.errors import ConfigError
from cantata.data.split import Split, split_indices


def test_train_and_held_out_part_the_whole() -> None:
    train, held_out, everything = (split_indices(2000, split, 0.1).tolist() for split in Split)
    assert sorted(train + held_out) == everything == list(range(2000))
    assert 150 < len(held_out) < 250


def test_growing_keeps_what_is_held_out() -> None:
    small = split_indices(500, Split.held_out, 0.1).tolist()
    assert split_indices(900, Split.held_out, 0.1).tolist()[: len(small)] == small


def test_no_share_holds_nothing_out() -> None:
    assert len(split_indices(50, Split.held_out, 0.0)) == 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_bad_share(share: float) -> None:
    with pytest.raises(ConfigError, match="held_out_share"):
        split_indices(5, Split.train, share)
