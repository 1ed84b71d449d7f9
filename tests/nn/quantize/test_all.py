"""What holds of every quantiser: precision, filling, saving, usage, decoding, coefficients, configs."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from cantata.core.build import build
from cantata.nn.quantize import Quantizer
from cantata.nn.quantize.base import usage
from tests.nn.quantize.small import ENTROPY, KINDS, gradients, rows, small

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "quantizer").glob("*.yaml"))
every = pytest.mark.parametrize("kind", KINDS)


@every
def test_works_in_fp32_whatever_comes(kind: str) -> None:
    quantizer = small(kind)
    half_ND = rows(20, seed=1).detach().bfloat16().requires_grad_()
    whole_ND = half_ND.detach().float().requires_grad_()
    wanted = quantizer(whole_ND)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(whole_ND)
    narrow = quantizer(half_ND)
    assert mixed.values_ND.dtype == torch.float32
    assert narrow.values_ND.dtype == torch.bfloat16
    for found in (mixed, narrow):
        assert found.indices_N.tolist() == wanted.indices_N.tolist()
        assert found.values_ND.tolist() == wanted.values_ND.to(found.values_ND.dtype).tolist()
        assert found.loss_sum.dtype == torch.float32
        assert found.loss_sum.item() == wanted.loss_sum.item()
        assert {name: part.item() for name, part in found.parts.items()} == {
            name: part.item() for name, part in wanted.parts.items()
        }
    narrow.values_ND.sum().backward()
    assert half_ND.grad is not None
    assert half_ND.grad.dtype == torch.bfloat16


@every
def test_autocast_leaves_gradients_alone(kind: str) -> None:
    quantizer, z_ND, weight_ND = small(kind), rows(20, seed=1), rows(20, seed=2).detach()
    _, wanted = gradients(quantizer, z_ND, weight_ND)
    wanted = {name: gradient.clone() for name, gradient in wanted.items() if gradient is not None}
    with torch.autocast("cpu", torch.bfloat16):
        made = quantizer(z_ND)
    quantizer.zero_grad()
    z_ND.grad = None
    ((made.values_ND * weight_ND).sum() + made.loss_sum).backward()
    found = {"z": z_ND.grad} | {name: p.grad for name, p in quantizer.named_parameters()}
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@every
def test_built_on_meta_every_tensor_is_filled(kind: str) -> None:
    make, arguments = KINDS[kind]
    with torch.device("meta"):
        quantizer = make(**arguments)
    tensors = [*quantizer.named_parameters(), *quantizer.named_buffers()]
    assert all(tensor.is_meta for _, tensor in tensors)
    quantizer.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in [*quantizer.named_parameters(), *quantizer.named_buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
            quantizer.init_parameter(name, tensor, torch.Generator().manual_seed(0))
            assert tensor.isfinite().all()
            assert (tensor != -77).all()
    assert quantizer(rows(4)).values_ND.isfinite().all()
    with pytest.raises(KeyError, match="nothing"):
        quantizer.init_parameter("nothing", torch.empty(()), torch.Generator())


@every
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_runs_without_values(kind: str, device: str) -> None:
    """Plans measure memory so; no quantiser may look at a value."""
    make, arguments = KINDS[kind]
    with FakeTensorMode() if device == "cpu" else nullcontext(), torch.device(device):
        quantizer = make(**arguments)
        z_ND = torch.empty(7, quantizer.dim, requires_grad=True)
        made = quantizer(z_ND)
        (made.values_ND.sum() + made.loss_sum).backward()
        assert z_ND.grad is not None
        assert z_ND.grad.shape == (7, quantizer.dim)


@every
def test_a_state_dict_holds_all_there_is(kind: str) -> None:
    first, second = small(kind, seed=1), small(kind, seed=2)
    z_ND = rows(20, seed=3)
    if first.state_dict():
        assert first(z_ND).values_ND.tolist() != second(z_ND).values_ND.tolist()
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        one.update(one(z_ND).statistics) if kind == "ema" else None
    found, wanted = (one(z_ND) for one in (first, second))
    assert torch.equal(found.values_ND, wanted.values_ND)
    assert torch.equal(found.loss_sum, wanted.loss_sum)


@every
def test_decoding_gives_the_values_and_usage_counts_rows(kind: str) -> None:
    quantizer = small(kind).eval()
    with torch.no_grad():
        made = quantizer(rows(50, seed=1))
        assert torch.equal(quantizer.decode(made.indices_N), made.values_ND)
    assert made.indices_N.dtype == made.usage_K.dtype == torch.int64
    books, codes = quantizer.num_codebooks, quantizer.num_codes
    assert made.indices_N.shape == ((50,) if books == 1 else (50, books))
    assert made.usage_K.shape == ((codes,) if books == 1 else (books, codes))
    counted = [
        [int((column == k).sum()) for k in range(codes)] for column in made.indices_N.view(50, -1).unbind(1)
    ]
    assert made.usage_K.view(books, codes).tolist() == counted
    assert torch.equal(usage(made.indices_N, codes), made.usage_K)


@every
def test_values_are_detached_from_nothing_but_the_choice(kind: str) -> None:
    """Parts carry no gradient, the values' gradient reaches the rows."""
    made, found = gradients(small(kind), rows(10, seed=1), rows(10, seed=2).detach())
    assert not any(part.requires_grad for part in made.parts.values())
    assert found["z"] is not None
    assert found["z"].abs().sum(1).min() > 0


@every
def test_every_argument_is_kept_under_its_name(kind: str) -> None:
    """Published tokenizers are described by them."""
    make, arguments = KINDS[kind]
    quantizer = small(kind)
    for name in inspect.signature(make).parameters:
        kept = getattr(quantizer, name)
        assert (list(kept) if isinstance(kept, tuple) else kept) == arguments[name]
    assert all(p.default is inspect.Parameter.empty for p in inspect.signature(make).parameters.values())


WEIGHTS = ("commitment", *ENTROPY)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, (_, arguments) in KINDS.items() for name in WEIGHTS if name in arguments],
)
def test_every_coefficient_counts(kind: str, name: str) -> None:
    z_ND, plain = rows(20, seed=1), KINDS[kind][1][name]
    before, after = (small(kind, **{name: value})(z_ND) for value in (plain, plain + 0.5))
    assert before.loss_sum.item() != after.loss_sum.item()
    if name != "entropy_temperature":
        term = {"commitment": "codebook"}.get(name, name) if kind == "ibq" else name
        sign = -1 if name == "batch_entropy" else 1
        change = (after.loss_sum - before.loss_sum).item()
        assert change == pytest.approx(sign * 0.5 * before.parts[term].item(), rel=1e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_build(path: Path) -> None:
    assert path.read_text().startswith("# ")
    quantizer = build(OmegaConf.to_container(OmegaConf.load(path)))
    assert isinstance(quantizer, Quantizer)
    published = {"emu3": 32768, "llamagen": 16384, "fsq": 1000}
    assert quantizer.num_codes == published.get(path.stem, 1024)


@every
def test_a_copy_in_the_middle_of_a_step_is_its_own(kind: str) -> None:
    quantizer = small(kind)
    quantizer(rows(5))
    twin = copy.deepcopy(quantizer)
    assert torch.equal(twin(rows(5)).values_ND, quantizer(rows(5)).values_ND)
