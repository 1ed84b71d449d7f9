"""Experts over two ranks: ours against transformers' own expert-parallel Aria, on the same checkpoint.

transformers 5.23 has a plan for Aria's experts (`AriaTextConfig.base_model_ep_plan`: whole experts on each
rank, tokens dispatched to them), switched on by `DistributedConfig(ep_size=2)` in one of two ways, both
compared here:

- `fsdp_size=2`: a batch on each rank, tokens by all-to-all, parameters sharded by FSDP2; as ours.
- `tp_size=2`: one batch on both ranks, the dense layers split as well; tokens by all-to-all where gradients
  are wanted, and otherwise each rank's experts on all tokens and an all-reduce.

Its older switch, `enable_expert_parallel=True`, is refused by 5.23 itself: it stands for an empty `tp_plan`,
and `tp_size=2` with an empty plan raises `ValueError`. Every gradient that 5.23 computes agrees with ours.
What it cannot run is a rank without an image under `fsdp_size=2`: no rule of its FSDP plan matches the vision
tower, which so belongs to the root's group, and backward fails in that group's reduce-scatter. Both samples
hold images for that reason.

Bounds in fp32: 1e-5 of the largest logit, and for a gradient 1e-5 of the largest value in its parameter's.
Measured: 2.5e-6 and 4e-6.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import StepTotals
from cantata.models.aria.hf import AriaLayout
from cantata.models.aria.model import aria_from_hub
from cantata.models.hub import HubReader, parameter_shapes, save_to_hub
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.parallel.recompute import Recompute
from cantata.tools.compared import relative_error
from cantata.tools.verify import Sample, pack, synthetic_samples, transformers_inputs
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from tests.distributed.spawn import run_ranks
from tests.distributed.test_fsdp2 import whole
from tests.models.aria.small import small_aria, small_layout

pytest.importorskip("transformers", minversion="5.23")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="transformers takes the accelerator, and these ranks have gloo alone",
    ),
]

BOUND = 1e-5
THEIRS = ("fsdp", "tp")


def samples(layout: AriaLayout) -> list[Sample]:
    """One for each rank, of unequal length, both with images."""
    return synthetic_samples(layout, seed=3)[1:]


def targets(layout: AriaLayout) -> list[int]:
    return [pack([sample], layout).num_targets for sample in samples(layout)]


def ours(directory: Path, layout: AriaLayout) -> dict[str, Any]:
    """This rank's sample; loss and gradients over both."""
    with torch.device("meta"):
        model = aria_from_hub(directory)
    engine = FSDP2Engine(
        model=model,
        mesh=build_mesh(MeshConfig(dp_replicate=1, dp_shard=-1, ep=2), dist.get_world_size(), "cpu"),
        source=HubReader(directory, layout, parameter_shapes(model)),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        parameters={},
        recompute=Recompute.none,
        compile=False,
        device=torch.device("cpu"),
        precision="fp32",
        state_dtype="fp32",
        offload="none",
    )
    batch = pack([samples(layout)[dist.get_rank()]], layout)
    with torch.no_grad():
        logits = engine.model(batch, with_logits=True).logits_TV
    totals = StepTotals(batch.num_tokens, sum(targets(layout)), sum(targets(layout)))
    engine.forward_backward(batch, NextToken(model.balance), totals, last=True)
    gradients = {
        layout.transformers_name(name): whole(parameter.grad)
        for name, parameter in engine.model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits, "gradients": gradients}


def theirs(directory: Path, layout: AriaLayout, kind: str) -> dict[str, Any]:
    """The same; with `tp` both samples on each rank, which splits the work on them."""
    import transformers
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(ep_size=2, **{f"{kind}_size": 2})
    model = transformers.AriaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, distributed_config=config
    )
    experts = model.model.language_model.layers[0].mlp.experts.gate_up_proj
    assert experts.to_local().shape[0] == layout.text.moe.num_experts // 2
    rank, world = dist.get_rank(), dist.get_world_size()
    here = range(world) if kind == "tp" else [rank]
    # FSDP averages over the ranks' batches, of which each is a part of the sum.
    scale = world if kind == "fsdp" else 1
    logits = []
    for index in here:
        inputs = transformers_inputs(samples(layout)[index], layout)
        with torch.no_grad():
            logits.append(model(**inputs, use_cache=False).logits[0])
        output = model(**inputs, use_cache=False)
        logits.append(output.logits[0].detach())
        (output.loss * targets(layout)[index] * scale / sum(targets(layout))).backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "gradients": gradients}


def on_a_rank(directory: Path, layout: AriaLayout) -> dict[str, dict[str, Any]]:
    return {"ours": ours(directory, layout)} | {kind: theirs(directory, layout, kind) for kind in THEIRS}


@pytest.fixture(scope="module")
def layout() -> AriaLayout:
    return small_layout()


@pytest.fixture(scope="module")
def ranks(layout: AriaLayout, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("hub") / "aria"
    save_to_hub(small_aria(layout), layout, directory, max_shard_bytes=10**9)
    return run_ranks(on_a_rank, 2, directory, layout)


def test_logits(ranks: Any) -> None:
    expected = [rank["ours"]["logits"] for rank in ranks]
    for index, rank in enumerate(ranks):
        pairs = [(found, expected[index]) for found in rank["fsdp"]["logits"]]
        pairs += zip(rank["tp"]["logits"], [expected[0], expected[0], expected[1], expected[1]], strict=True)
        for found, wanted in pairs:
            assert relative_error(wanted, found, found) < BOUND


@pytest.mark.parametrize("kind", THEIRS)
def test_every_gradient(kind: str, ranks: Any) -> None:
    for rank in ranks:
        found, wanted = rank["ours"]["gradients"], rank[kind]["gradients"]
        assert found.keys() == wanted.keys()
        errors = {name: gradient_error(name, found, wanted) for name in found}
        assert {name: error for name, error in errors.items() if error >= BOUND} == {}


def gradient_error(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    # A key bias moves all scores of a query alike, so its gradient is 0: the query bias's is the scale.
    scale = wanted[name.replace("k_proj.bias", "q_proj.bias")]
    return relative_error(found[name], wanted[name].reshape(found[name].shape), scale)
