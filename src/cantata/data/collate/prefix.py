"""Packed samples whose images begin with a random prefix, as AIMv2's encoder learns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from cantata.core.samples import Sample
from cantata.core.types import RowInfo
from cantata.data.collate.packed import PackedCollator, Row


class PrefixCollator(PackedCollator):
    """Packs as `PackedCollator`, and draws of each image how many of its patches see one another whole.

    Of I patches these are the first M, drawn evenly from 1 to I - 1 (Fini et al., 2024, arXiv:2411.14402);
    an image of one patch is all prefix. What is drawn is a function of the sample and of how far its stream
    has come, so any worker, rank or resumed run draws the same, and each epoch anew; of held-out data always
    the same.

    Args:
        processor: the family's processor.
    """

    def row(self, samples: Sequence[Sample], info: RowInfo | None = None) -> Row:
        """See `PackedCollator.row`."""
        place = 0 if info is None else info.state["next"]
        prefix = tuple(count for sample in samples for count in drawn_prefixes(sample, place))
        return super().row(samples, info)._replace(prefix=prefix)


def drawn_prefixes(sample: Sample, place: int) -> list[int]:
    """The prefix of each of a sample's images in a row of a stream that stands at `place`."""
    digest = hashlib.blake2b(json.dumps([sample.key, place]).encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    counts = [len(image.patches_PC) for image in sample.images]
    return [1 if count < 2 else int(rng.integers(1, count)) for count in counts]
