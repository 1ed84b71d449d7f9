"""The MoE layers that `moe_layer.py` runs ours against, holding our weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AriaTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.aria.modeling_aria import AriaTextMoELayer

from cantata.nn.moe.layer import MoELayer


class Shape(NamedTuple):
    """One layer's sizes; `shared` experts of `width` make the shared one."""

    hidden: int
    width: int
    experts: int
    top_k: int
    shared: int


class Layer(NamedTuple):
    """A layer under test."""

    name: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]


def peers(ours: MoELayer, shape: Shape, tokens: int) -> Iterator[Layer]:
    """Every peer that runs, one at a time, with our weights; a line for each that does not."""
    weight = ours.experts.fc1
    for name in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        label = f"transformers {name}"
        if name == "batched_mm":
            needed = tokens * shape.top_k * 2 * 3 * shape.hidden * shape.width * weight.element_size()
            if needed > 2**33:
                print(
                    f"  {label}: left out, it copies weights for every token: {needed / 2**30:.0f} GiB here"
                )
                continue
        layer = _transformers(ours, shape, name)
        yield from _if_it_runs(Layer(label, layer, _unbatched(layer)), weight)
    if weight.dtype != torch.bfloat16:
        print("  torchtitan: left out, its experts multiply in bf16 only")
        return
    try:
        layer = _torchtitan(ours, shape)
    except ImportError as error:
        print(f"  torchtitan: not installed ({error})")
        return
    yield from _if_it_runs(Layer("torchtitan", layer, _unbatched(layer)), weight)


def _if_it_runs(layer: Layer, weight: Tensor) -> Iterator[Layer]:
    x_TD = torch.randn(16, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    try:
        layer.run(x_TD).sum().backward()
    except Exception as error:  # whatever keeps a peer from running here is its own affair
        print(f"  {layer.name}: does not run ({type(error).__name__}: {str(error).splitlines()[0][:150]})")
        return
    yield layer


def _unbatched(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x_TD: layer(x_TD[None])[0]


def _transformers(ours: MoELayer, shape: Shape, implementation: str) -> nn.Module:
    config = AriaTextConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        moe_num_experts=shape.experts,
        moe_topk=shape.top_k,
        moe_num_shared_experts=shape.shared,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer = AriaTextMoELayer(config)
    names = {"experts.gate_up_proj": "experts.fc1", "experts.down_proj": "experts.fc2"}
    mine = ours.state_dict()
    weights = {name: mine[names.get(name, name)].clone() for name in layer.state_dict()}
    layer.load_state_dict(weights, assign=True)
    return layer.train().requires_grad_()


def _torchtitan(ours: MoELayer, shape: Shape) -> nn.Module:
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    size, inner = shape.hidden, shape.shared * shape.width
    up, down = (
        Linear.Config(in_features=size, out_features=inner),
        Linear.Config(in_features=inner, out_features=size),
    )
    gate = Linear.Config(in_features=size, out_features=shape.experts)
    config = MoE.Config(
        num_experts=shape.experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=size, hidden_dim=shape.width, num_experts=shape.experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k),
        ),
        # The normalised softmax over all experts is the softmax over the chosen ones.
        router=TokenChoiceTopKRouter.Config(
            num_experts=shape.experts, gate=gate, top_k=shape.top_k, score_func="softmax", route_norm=True
        ),
        load_balance_coeff=None,
        shared_experts=FeedForward.Config(w1=up, w2=down, w3=up),
    )
    layer: nn.Module = MoE(config)
    gate_EDF, up_EDF = ours.experts.fc1.detach().chunk(2, dim=-1)
    weights = {
        "router.gate.weight": ours.router.weight,
        "routed_experts.inner_experts.w1_EFD": gate_EDF.transpose(1, 2),
        "routed_experts.inner_experts.w3_EFD": up_EDF.transpose(1, 2),
        "routed_experts.inner_experts.w2_EDF": ours.experts.fc2.transpose(1, 2),
        "shared_experts.w1.weight": ours.shared_experts.gate_proj.weight,
        "shared_experts.w3.weight": ours.shared_experts.up_proj.weight,
        "shared_experts.w2.weight": ours.shared_experts.down_proj.weight,
    }
    layer.to(ours.router.weight.device, ours.router.weight.dtype)
    layer.load_state_dict({name: weight.detach().contiguous() for name, weight in weights.items()})
    return layer.train()
