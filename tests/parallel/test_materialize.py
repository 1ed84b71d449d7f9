"""Values come from the name, whole. Layouts are compared in tests/distributed/test_fsdp2.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cantata.core.errors import RunError
from cantata.parallel.materialize import Assembled, Index, RandomInit, materialize, persistent_tensors
from tests.distributed.standin import build_on_meta

CPU = torch.device("cpu")


class Recorder:
    """A source that writes down what it is asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.asked: dict[str, Index] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def read(self, name: str, index: Index) -> Tensor:
        assert name not in self.asked
        self.asked[name] = index
        return torch.full([part.stop - part.start for part in index], 2.0)


def test_the_seed_and_the_name_make_the_value() -> None:
    model = build_on_meta()
    first, again, other = RandomInit(model, 1), RandomInit(model, 1), RandomInit(model, 2)
    index = (slice(0, 12), slice(0, 12))
    name, sibling = "blocks.0.mix.weight", "blocks.1.mix.weight"
    assert torch.equal(first.read(name, index), again.read(name, index))
    assert not torch.equal(first.read(name, index), first.read(sibling, index))
    assert not torch.equal(first.read(name, index), other.read(name, index))
    part = (slice(3, 7), slice(0, 12))
    assert torch.equal(first.read(name, part), first.read(name, index)[3:7])


def test_a_source_is_asked_once_for_what_it_holds_in_its_own_order() -> None:
    model = build_on_meta(tied=True)
    names = [name for name, _ in persistent_tensors(model)][::-1]
    assert "blocks.0.expert_bias_E" in names
    assert "head.output.weight" not in names, "it is the embedding"
    source = Recorder(names)
    materialize(model, source, CPU)
    assert list(source.asked) == names
    assert model.head.output.weight is model.embedding.weight
    for _, tensor in persistent_tensors(model):
        assert torch.equal(tensor, torch.full_like(tensor, 2.0))
    for block in model.blocks:
        assert torch.equal(block.scale_D, torch.ones(12)), "it comes from the model, not from the source"


def test_buffers_may_be_missing_from_a_source_and_parameters_may_not() -> None:
    model = build_on_meta()
    names = [name for name, _ in model.named_parameters()]
    materialize(model, Recorder(names), CPU)
    assert not model.blocks[0].expert_bias_E.any()
    with pytest.raises(RunError, match=f"parameter {names[0]} has no initial value"):
        materialize(build_on_meta(), Recorder(names[1:]), CPU)


def test_values_are_cast_to_the_stored_type() -> None:
    model, same = build_on_meta(), build_on_meta()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    materialize(model, RandomInit(model, 1), CPU)
    materialize(same, RandomInit(same, 1), CPU)
    for (name, value), (_, wanted) in zip(model.named_parameters(), same.named_parameters(), strict=True):
        assert value.dtype == torch.bfloat16, name
        assert torch.equal(value, wanted.to(torch.bfloat16)), name


def test_frozen_parameters_stay_frozen() -> None:
    model = build_on_meta()
    model.blocks[0].mix.weight.requires_grad_(False)
    materialize(model, RandomInit(model, 1), CPU)
    assert not model.blocks[0].mix.weight.requires_grad
    assert model.blocks[1].mix.weight.requires_grad


def test_a_foreign_model_is_named() -> None:
    with pytest.raises(TypeError, match="Linear lacks init_parameter"):
        RandomInit(torch.nn.Linear(1, 1), 0)


def test_parts_come_from_their_own_sources_and_the_rest_from_another() -> None:
    class Constant:
        def __init__(self, value: float, *names: str) -> None:
            self.value, self.names = value, names

        def __iter__(self) -> Iterator[str]:
            return iter(self.names)

        def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
            return torch.full([part.stop - part.start for part in index], self.value)

    source = Assembled(Constant(0.0, "a", "b", "c"), [Constant(1.0, "b"), Constant(2.0, "c")])
    assert list(source) == ["b", "c", "a"]
    assert [source.read(name, (slice(0, 2),)).tolist() for name in "abc"] == [[0, 0], [1, 1], [2, 2]]
