"""Moving averages against loops, and codes without rows that are replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.nn.quantize import EMAVectorQuantizer, Quantized
from tests.nn.quantize.small import CODES, close, gradients, rows, small


def trained(quantizer: EMAVectorQuantizer, *micro_batches: Tensor) -> list[Quantized]:
    """One step: forward on each, then one update with the sums."""
    made = [quantizer(z_ND) for z_ND in micro_batches]
    quantizer.update(
        {name: sum(one.statistics[name] for one in made) for name in ("ema/rows_K", "ema/sum_KD")}
    )
    return made


def begun(**changes: Any) -> EMAVectorQuantizer:
    """After the first update, which draws all codes from rows."""
    quantizer: Any = small("ema", **changes)
    trained(quantizer, rows(30, seed=9).detach())
    return quantizer


def test_loss_and_gradient_equal_their_formula() -> None:
    quantizer = small("ema")
    z_ND, weight_ND = rows(20, seed=1), rows(20, seed=2).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)
    loss, codes = 0.0, quantizer.codebook_KD.tolist()
    for n, z in enumerate(z_ND.tolist()):
        distances = [sum((a - b) ** 2 for a, b in zip(z, e, strict=True)) for e in codes]
        k = distances.index(min(distances))
        assert made.indices_N[n] == k
        assert made.values_ND[n].tolist() == codes[k]
        loss += distances[k] / 3
        wanted = [
            w + 0.25 * 2 / 3 * (a - b) for w, a, b in zip(weight_ND[n].tolist(), z, codes[k], strict=True)
        ]
        close(found["z"][n], torch.tensor(wanted))
    assert made.parts["commitment"].item() == pytest.approx(loss, rel=1e-6)
    assert made.loss_sum.item() == pytest.approx(0.25 * loss, rel=1e-6)
    assert list(found) == ["z"], "nothing else is learnt by gradients"


def test_codes_follow_their_rows() -> None:
    quantizer = begun(reset_below=0.0, decay=0.8, eps=1e-2)
    size = quantizer.cluster_size_K.tolist()
    total = quantizer.cluster_sum_KD.tolist()
    for step in range(3):
        micro_batches = [rows(11, seed=2 * step + part).detach() for part in range(2)]
        made = trained(quantizer, *micro_batches)
        indices = [index for one in made for index in one.indices_N.tolist()]
        values = [row for z_ND in micro_batches for row in z_ND.tolist()]
        for k in range(CODES):
            mine = [row for row, index in zip(values, indices, strict=True) if index == k]
            size[k] = 0.8 * size[k] + 0.2 * len(mine)
            total[k] = [0.8 * t + 0.2 * sum(row[d] for row in mine) for d, t in enumerate(total[k])]
        everything = sum(size)
        for k in range(CODES):
            smooth = (size[k] + 1e-2) / (everything + CODES * 1e-2) * everything
            close(quantizer.codebook_KD[k], torch.tensor(total[k]) / smooth)
        close(quantizer.cluster_size_K, torch.tensor(size))
        close(quantizer.cluster_sum_KD, torch.tensor(total))


def test_the_first_codes_are_rows_of_the_first_step() -> None:
    quantizer: Any = small("ema", reset_below=0.0)
    first, second = rows(9, seed=1).detach(), rows(9, seed=2).detach()
    trained(quantizer, first, second)
    seen = {tuple(row) for row in [*first.tolist(), *second.tolist()]}
    codes = {tuple(row) for row in quantizer.codebook_KD.tolist()}
    assert len(codes) == CODES
    assert codes <= seen
    # Each has the weight of a code's mean share: 18 rows, a tenth of them kept by the decay, 8 codes.
    close(quantizer.cluster_size_K, torch.full((CODES,), 0.1 * 18 / CODES))


def test_too_few_rows_fill_the_lowest_codes_first() -> None:
    quantizer: Any = small("ema")
    before = quantizer.codebook_KD.clone()
    z_ND = rows(3, seed=1).detach()
    trained(quantizer, z_ND)
    assert {tuple(row) for row in quantizer.codebook_KD[:3].tolist()} == {tuple(row) for row in z_ND.tolist()}
    unmet = quantizer.cluster_size_K[3:] == 0
    assert unmet.sum() >= 2, "three rows meet three codes"
    assert quantizer.codebook_KD[3:][unmet].tolist() == before[3:][unmet].tolist()


def test_only_codes_that_no_row_meets_are_replaced() -> None:
    quantizer = begun(reset_below=0.3)
    with torch.no_grad():
        quantizer.codebook_KD[2:5] = 1e3
        quantizer.cluster_sum_KD[2:5] = 1e3 * quantizer.cluster_size_K[2:5, None]
    for step in range(40):
        z_ND = rows(40, seed=step).detach()
        size = quantizer.cluster_size_K.clone()
        counts = trained(quantizer, z_ND)[0].usage_K
        size = 0.9 * size + 0.1 * counts
        dead = size < 0.3 * size.mean()
        drawn = torch.tensor(
            [tuple(e) in set(map(tuple, z_ND.tolist())) for e in quantizer.codebook_KD.tolist()]
        )
        assert drawn.tolist() == dead.tolist()
        close(quantizer.cluster_size_K, torch.where(dead, size.mean(), size))
        close(quantizer.cluster_sum_KD[dead], quantizer.codebook_KD[dead] * size.mean())
        if dead.any():
            break
    assert dead.tolist() == [False, False, True, True, True, False, False, False]
    assert torch.isfinite(quantizer.codebook_KD).all()
    assert quantizer(rows(200, seed=99)).usage_K.min() > 0


def test_evaluation_leaves_no_trace() -> None:
    quantizer = begun()
    with torch.no_grad():
        assert quantizer(rows(5)).statistics == {}
    assert quantizer.eval()(rows(5)).statistics == {}
    quantizer.train()
    other = begun()
    for one in (quantizer, other):
        with torch.no_grad():
            one.cluster_size_K[:4] = 0
        trained(one, rows(20, seed=4).detach())
    assert quantizer.codebook_KD.tolist() == other.codebook_KD.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": 1.0}, r"decay=1\.0 must be at least 0 and below 1"),
        ({"eps": 0.0}, r"eps=0\.0 must be a number above 0"),
        ({"reset_below": -0.1}, r"reset_below=-0\.1 must be"),
        ({"num_codes": 1}, r"num_codes=1 must be"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.quantizer\.{message}"):
        small("ema", **changes)
