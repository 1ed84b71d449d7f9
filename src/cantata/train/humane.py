"""Numbers as people read them."""

from __future__ import annotations

COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(number: float) -> str:
    """Three figures and a suffix: 7.34M, 25.3B, 640."""
    return _scaled(number, COUNTS)


def flops(number: float) -> str:
    """Operations: 152 GFLOP, 1.52 PFLOP."""
    text = _scaled(number, PREFIXES)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def _scaled(number: float, scales: tuple[tuple[float, str], ...]) -> str:
    for size, suffix in scales:
        # From 999.5 of the smaller unit on, three figures round to 1000.
        if abs(number) >= size * 0.9995:
            return f"{_three_figures(number / size)}{suffix}"
    return f"{number:.0f}"


def _three_figures(number: float) -> str:
    decimals = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{decimals}f}"


def size(number_of_bytes: float) -> str:
    """Bytes in binary units: 83 MiB, 1.25 GiB."""
    mib = number_of_bytes / 2**20
    if mib < 1:
        return f"{number_of_bytes / 1024:.0f} KiB"
    return f"{mib:.0f} MiB" if mib < 1000 else f"{_three_figures(mib / 1024)} GiB"


def duration(seconds: float) -> str:
    """42s, 3:07, 2:05:00, 3d 04:00."""
    if seconds < 60:
        return f"{seconds:.0f}s" if seconds < 59.5 else "1:00"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def hours(number: float) -> str:
    """0.12, 3.40, 17, 25,600."""
    return _three_figures(number) if number < 10 else f"{number:,.0f}"


def value(number: float | None, form: str) -> str:
    """A formatted number, or a dash where there is none."""
    return "-" if number is None else format(number, form)
