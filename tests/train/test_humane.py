import pytest

from cantata.train import humane


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (640, "640"),
        (999, "999"),
        (999.9, "1.00k"),
        (1234, "1.23k"),
        (99_949, "99.9k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (7_340_000, "7.34M"),
        (25.3e9, "25.3B"),
        (6.4e12, "6.40T"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert humane.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12 FLOP"), (1.52e11, "152 GFLOP"), (9.9e15, "9.90 PFLOP"), (2.5e18, "2.50 EFLOP")],
)
def test_flops(number: float, text: str) -> None:
    assert humane.flops(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(2048, "2 KiB"), (83 * 2**20, "83 MiB"), (1.25 * 2**30, "1.25 GiB"), (80 * 2**30, "80.0 GiB")],
)
def test_size(number: float, text: str) -> None:
    assert humane.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.7, "1:00"),
        (187, "3:07"),
        (3599.6, "1:00:00"),
        (7500, "2:05:00"),
        (3 * 86400 + 4 * 3600, "3d 04:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert humane.duration(seconds) == text


def test_value() -> None:
    assert humane.value(None, ".4f") == "-"
    assert humane.value(1.5, ".2f") == "1.50"
