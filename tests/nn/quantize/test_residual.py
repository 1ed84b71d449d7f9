"""Residual quantisation against its formula, one row and one codebook after another."""

from __future__ import annotations

import pytest
import torch

from cantata.core.errors import ConfigError
from tests.nn.quantize.small import close, gradients, rows, small


@pytest.mark.parametrize("kind", ["residual", "shared"])
def test_equals_its_formula(kind: str) -> None:
    quantizer = small(kind)
    z_ND, weight_ND = rows(15, seed=1), rows(15, seed=2).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)

    slow_z = z_ND.detach().double().requires_grad_()
    books = [p.detach().double().requires_grad_() for p in quantizer.parameters()]
    codebook = committed = torch.zeros((), dtype=torch.float64)
    values, indices = [], []
    for z in slow_z:
        total, chosen = torch.zeros(3, dtype=torch.float64), []
        for depth in range(3):
            codes = books[depth % len(books)]
            rest = z - total
            distances = [(rest - e).square().sum().item() for e in codes]
            chosen.append(distances.index(min(distances)))
            code = codes[chosen[-1]]
            codebook = codebook + (code - rest.detach()).square().mean()
            committed = committed + (code.detach() - rest).square().mean()
            total = total + code.detach()
        values.append(z + (total - z).detach())
        indices.append(chosen)
    loss = codebook + 0.25 * committed
    ((torch.stack(values) * weight_ND).sum() + loss).backward()

    assert made.indices_N.tolist() == indices
    assert made.usage_K.tolist() == [
        [sum(row[r] == k for row in indices) for k in range(quantizer.num_codes)] for r in range(3)
    ]
    close(made.values_ND, torch.stack(values))
    close(made.loss_sum, loss)
    close(made.parts["codebook"], codebook)
    close(found["z"], slow_z.grad)
    for (name, _), book in zip(quantizer.named_parameters(), books, strict=True):
        close(found[name], book.grad)


def test_the_codebook_is_shared_or_not() -> None:
    assert len(list(small("residual").parameters())) == 3
    assert len(list(small("shared").parameters())) == 1


@pytest.mark.parametrize("name", ["num_codebooks", "num_codes"])
def test_bad_settings_are_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.quantizer\.{name}=0 must be at least"):
        small("residual", **{name: 0})
