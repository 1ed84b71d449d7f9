"""What plans and trainers rely on holds for every family; a new one adds itself to FAMILIES."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cantata.core.types import Batch
from cantata.models.protocol import LanguageModel
from cantata.tools.verify import pack, synthetic_samples
from tests.models.aria.small import small_aria, small_layout
from tests.nn.moe.small import balance

LAYOUT = small_layout(moe={"balance": balance(4, bias=0.01)})


def aria() -> tuple[nn.Module, Batch]:
    return small_aria(LAYOUT), pack(synthetic_samples(LAYOUT, 0), LAYOUT, padding=3)


FAMILIES = [aria]
family = pytest.mark.parametrize("make", FAMILIES)
Make = Callable[[], tuple[nn.Module, Batch]]


def test_any_module_is_no_language_model() -> None:
    assert not isinstance(nn.Linear(1, 1), LanguageModel)


@family
def test_units_run_in_the_order_they_are_named(make: Make) -> None:
    model, batch = make()
    assert isinstance(model, LanguageModel)
    ran: list[str] = []
    for unit in model.units():
        assert model.get_submodule(unit.name) is unit.module
        unit.module.register_forward_pre_hook(lambda *_, name=unit.name: ran.append(name))
    model(batch)
    assert ran == [unit.name for unit in model.units()]


@family
def test_units_overlap_nowhere_and_leave_the_root_nothing_large(make: Make) -> None:
    """What no unit holds is gathered for the whole of a step."""
    model, _ = make()
    assert isinstance(model, LanguageModel)
    held = [parameter for unit in model.units() for parameter in unit.module.parameters()]
    assert len(held) == len({id(parameter) for parameter in held})
    root = [p for p in model.parameters() if not any(p is other for other in held)]
    assert all(parameter.dim() == 1 for parameter in root)


@family
def test_router_stats_have_a_row_for_each_moe_layer(make: Make) -> None:
    model, batch = make()
    assert isinstance(model, LanguageModel)
    layers = model.moe_layers()
    router = model(batch).router
    assert router is not None
    assert router.z_sum.shape == router.sequence_sum.shape == (len(layers),)
    assert router.tokens_per_expert_ME.shape[0] == len(layers)
    assert (model.balance.bias_update_rate > 0) == (layers[0].router.expert_bias_E is not None)


@family
def test_the_published_names_are_as_many_as_ours(make: Make) -> None:
    model, _ = make()
    assert isinstance(model, LanguageModel)
    layout, shapes = model.hub_layout(), {name: p.shape for name, p in model.named_parameters()}
    assert len({layout.to_hub(name) for name in shapes}) == len(shapes)
    for name, shape in shapes.items():
        assert layout.hub_shape(name, shape).numel() == shape.numel(), name


@family
def test_longer_samples_cost_more_for_each_token(make: Make) -> None:
    model, _ = make()
    assert isinstance(model, LanguageModel)
    assert model.flops_per_token(200.0) > model.flops_per_token(100.0) > 0


@family
def test_initial_values_follow_the_generator_alone(make: Make) -> None:
    model, _ = make()
    assert isinstance(model, LanguageModel)
    for name, tensor in model.state_dict().items():
        values = []
        for garbage in (7.0, torch.nan):
            values.append(torch.full_like(tensor, garbage))
            model.init_parameter(name, values[-1], torch.Generator().manual_seed(3))
        assert torch.equal(*values), name
