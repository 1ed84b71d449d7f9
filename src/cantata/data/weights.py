"""From shares of tokens to shares of samples, which is what an order counts."""

from __future__ import annotations

from dataclasses import replace

from cantata.core.errors import ConfigError
from cantata.core.samples import Sample
from cantata.data.order import key, permute
from cantata.data.reading import Reader, Source

PROBE = 128
"""Samples of each source that are read to estimate its tokens a sample."""


def weights_of_tokens(reader: Reader) -> dict[str, Source]:
    """The reader's sources, with weights of samples under which tokens come in the shares that were given.

    A source's mean tokens are estimated once, from `PROBE` samples at places that depend on its size alone
    (all of them where it has no more; of a sequential source the first), a sample that is left out counting
    as none. Every rank finds the same weights without asking the others, and the order stays a function of
    seed and position. The price is an estimate: a source whose lengths vary by their own mean has a standard
    error of 1 / sqrt(128), 9%, of its share, and a rare very long sample may be missed. Every rank reads the
    probe when the run starts.

    Raises `ConfigError` where none of a source's probe can be used.
    """
    return {
        name: replace(source, weight=source.weight / mean_tokens(reader, name))
        for name, source in reader.sources.items()
    }


def mean_tokens(reader: Reader, name: str) -> float:
    """Tokens of a sample of the source on average, as the probe has it. Raises `ConfigError`."""
    source = reader.sources[name]
    size = len(source.dataset)
    places = range(min(PROBE, size))
    probed = [place if source.is_sequential else permute(place, size, key("probe", size)) for place in places]
    samples = [reader.read(name, index) for index in probed]
    total = sum(len(sample) for sample in samples if isinstance(sample, Sample))
    if not total:
        raise ConfigError(
            f"{reader.key}.{name}: none of {len(probed)} samples can be used, so data.weight_unit=tokens has "
            "nothing to go by; mend the data, or set data.weight_unit=samples"
        )
    return total / len(probed)
