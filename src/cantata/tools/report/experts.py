"""Heat maps of the experts' load by modality over time, from `experts/counts.npy`.

Shape suffixes as in `cantata.core.types`: L MoE layers, E experts; N intervals.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cantata.core.types import MODALITIES
from cantata.tools.html import data_url
from cantata.train.expert_maps import CROSS, DEAD, SILENT, colour_of

FRAMES = 12
"""Intervals that are shown; first and last are."""
CELL, GAP = 9, 1
"""Pixels of a cell and between two."""


class Frame(NamedTuple):
    """One interval of one modality."""

    first_step: int
    last_step: int
    picture: str
    """A data URL, `CELL` pixels a cell."""
    loads: str
    """Load over the ideal in hundredths, layer by layer; -1 is an expert without any token at all."""
    dead: int


class ExpertMap(NamedTuple):
    """The load by the tokens of one modality."""

    modality: str
    layers: int
    experts: int
    frames: list[Frame]


class Experts(NamedTuple):
    """What a run's page says of its experts."""

    maps: list[ExpertMap]
    intervals: int
    problem: str = ""
    """Why the file cannot be shown, in one line; empty where it can."""


def read_experts(path: Path) -> Experts:
    """All that a file tells; nothing where there is none, as of a model without experts."""
    if not path.exists():
        return Experts([], 0)
    try:
        counts = np.load(path, allow_pickle=False)
        tokens_NLME = counts["tokens_per_expert"]
        first, last = counts["first_step"], counts["last_step"]
        if tokens_NLME.ndim != 4 or tokens_NLME.shape[2] != len(MODALITIES):
            raise ValueError(f"shape {tokens_NLME.shape}")
    except (ValueError, EOFError, OSError, IndexError) as error:
        return Experts([], 0, f"{path} cannot be read: {error}")
    chosen = spread(len(tokens_NLME), FRAMES)
    maps = []
    for index, modality in enumerate(MODALITIES):
        if tokens_NLME[:, :, index].any():
            frames = [
                _frame(int(first[n]), int(last[n]), tokens_NLME[n, :, index], tokens_NLME[n].sum(1))
                for n in chosen
            ]
            maps.append(ExpertMap(modality, tokens_NLME.shape[1], tokens_NLME.shape[3], frames))
    return Experts(maps, len(tokens_NLME))


def spread(total: int, most: int) -> list[int]:
    """Up to `most` of `total` places, evenly, first and last among them."""
    if total <= most:
        return list(range(total))
    return [round(place * (total - 1) / (most - 1)) for place in range(most)]


def _frame(first: int, last: int, tokens_LE: NDArray[np.int64], all_tokens_LE: NDArray[np.int64]) -> Frame:
    ideal_L1 = tokens_LE.mean(1, keepdims=True)
    load_LE = np.divide(tokens_LE, ideal_L1, out=np.zeros(tokens_LE.shape), where=ideal_L1 > 0)
    dead_LE = all_tokens_LE == 0
    hundredths = np.where(dead_LE, -1, np.rint(load_LE * 100)).astype(int)
    loads = ",".join(map(str, hundredths.ravel().tolist()))
    return Frame(first, last, data_url(picture(load_LE, dead_LE)), loads, int(dead_LE.sum()))


def picture(load_LE: NDArray[np.float64], dead_LE: NDArray[np.bool_]) -> Image.Image:
    """Layers down, experts across, in the colours of the run's own pictures; gaps are transparent."""
    layers, experts = load_LE.shape
    pixels = np.zeros((layers, CELL, experts, CELL, 4), dtype=np.uint8)
    side = CELL - GAP
    for layer, expert in np.ndindex(layers, experts):
        load = float(load_LE[layer, expert])
        fill = DEAD if dead_LE[layer, expert] else colour_of(load) if load else SILENT
        pixels[layer, :side, expert, :side] = (*fill, 255)
        if dead_LE[layer, expert]:
            along = np.arange(side)
            pixels[layer, along, expert, along] = pixels[layer, along, expert, along[::-1]] = (*CROSS, 255)
    return Image.fromarray(pixels.reshape(layers * CELL, experts * CELL, 4), "RGBA")
