"""Checkpoints know no layout: saved at any mesh, loaded at any other, bit for bit.

One state, every element of it different, starts on one rank and is handed from layout to layout: each
loads it, saves it again, and loads what each of the others saved. Model, moments and counts must stay what
they were at the start, and the Hugging Face directories made of the checkpoints must be the same bytes.
"""

from __future__ import annotations

import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cantata.core.build import build
from cantata.core.config import compose, resolved, save_config
from cantata.parallel.materialize import RandomInit
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.parallel.recompute import Recompute
from cantata.tools.export import export
from cantata.train.checkpoint import CheckpointConfig, Checkpointer, fingerprint
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.optim import ParameterRule
from tests.distributed.spawn import run_ranks
from tests.distributed.test_fsdp2 import whole
from tests.recipes.runner import TINY

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
TIMEOUT_S = 400.0
FROZEN = ParameterRule(learning_rate=None, weight_decay=None, frozen=True)


class Layout(NamedTuple):
    """A world and how it is divided; its name is that of its run directory."""

    world: int
    ep: int
    dp_replicate: int = 1

    @property
    def name(self) -> str:
        return f"world-{self.world}-ep-{self.ep}-replicate-{self.dp_replicate}"


FIRST = Layout(1, 1)
EVEN = (FIRST, Layout(2, 1), Layout(2, 2), Layout(4, 1), Layout(4, 2), Layout(4, 4), Layout(4, 2, 2))
"""For 4 experts: where ep and FSDP meet (world 4, ep 2) both cut the experts' own dimension."""
ODD = (FIRST, Layout(4, 1), Layout(4, 2))
"""For 6 experts: 3 a rank at ep 2 and 6 over 4 ranks, which FSDP cuts along the next dimension."""
CASES = {"even": EVEN, "odd": ODD}


def overrides(case: str) -> list[str]:
    if case == "even":
        return ["model.text.moe.num_experts=4"]
    groups = "model.text.moe.balance.aux_loss_groups=6"
    # A bias is no obstacle to a checkpoint, but to an export.
    return ["model.text.moe.num_experts=6", groups, "model.text.moe.balance.bias_update_rate=1e-3"]


def build_engine(model_node: dict[str, Any], layout: Layout) -> FSDP2Engine:
    with torch.device("meta"):
        model = build(model_node)
    return FSDP2Engine(
        model=model,
        mesh=build_mesh(MeshConfig(layout.dp_replicate, -1, layout.ep), dist.get_world_size(), "cpu"),
        source=RandomInit(model, seed=0),
        optimizer=OPTIMIZER,
        parameters={"vision.*": FROZEN, "projector.*": FROZEN},
        recompute=Recompute.none,
        compile=False,
        device=torch.device("cpu"),
        precision="fp32",
        state_dtype="fp32",
        offload="none",
    )


def values(name: str, shape: torch.Size) -> Tensor:
    """What tensor `name` holds all along; no two elements are likely to agree."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def different(engine: FSDP2Engine) -> list[str]:
    """Names of tensors that are not bit for bit what they should be; a collective for each tensor."""
    state = {name: whole(value) for name, value in engine.state_dict().items()}
    return [name for name, value in state.items() if not torch.equal(value, values(name, value.shape))]


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def local_parts(engine: FSDP2Engine) -> dict[str, Tensor]:
    return {name: local(value).clone() for name, value in engine.state_dict().items()}


def step_2(root: Path, case: str, layout: Layout) -> Path:
    return root / case / layout.name / "checkpoints" / "step-00000002"


def start(root: Path, nodes: dict[str, dict[str, Any]]) -> None:
    """On one rank: the state, saved as step 1 of the first layout's run directory."""
    for case, node in nodes.items():
        engine = build_engine(node, FIRST)
        for name, value in engine.state_dict().items():
            local(value).copy_(values(name, value.shape))
        checkpoints = open_run(root / case / "start", engine)
        checkpoints.save(1, engine, {}, {})
        checkpoints.close()


def open_run(run: Path, engine: FSDP2Engine) -> Checkpointer:
    config = CheckpointConfig(every=1, keep=9, background=True, resume="auto", best=None)
    return Checkpointer(run, config, fingerprint(engine.model))


def relay(root: Path, nodes: dict[str, dict[str, Any]], worlds: tuple[int, ...]) -> list[str]:
    """At every layout of this world load the start and save it on; then load what those of `worlds` saved.

    The first load is held against the whole values, the others against what it left on this rank. Returns
    a line for each pair of layouts and each tensor that came out changed.
    """
    wrong = []
    for case, node in nodes.items():
        runs = []
        for layout in (layout for layout in CASES[case] if layout.world == dist.get_world_size()):
            engine = build_engine(node, layout)
            checkpoints = open_run(root / case / layout.name, engine)
            reload(root / case / "start" / "checkpoints" / "step-00000001", engine, checkpoints)
            wrong += [f"the start at {layout.name}: {name}" for name in different(engine)]
            runs.append((layout, engine, checkpoints, local_parts(engine)))
            if checkpoints.latest() is None:
                checkpoints.save(2, engine, {}, {})
                checkpoints.wait()
        sources = [other for other in CASES[case] if other.world in worlds]
        for layout, engine, checkpoints, parts in runs:
            for source in sources:
                reload(step_2(root, case, source), engine, checkpoints)
                found = local_parts(engine)
                changed = [name for name, part in parts.items() if not torch.equal(found[name], part)]
                wrong += [f"{source.name} at {layout.name}: {name}" for name in changed]
            checkpoints.close()
    return wrong


def reload(source: Path, engine: FSDP2Engine, checkpoints: Checkpointer) -> None:
    for value in engine.state_dict().values():
        local(value).fill_(torch.nan)
    checkpoints.load(source, engine)


JOURNEY = ((1, (1,)), (2, (1, 2)), (4, (1, 2, 4)), (2, (4,)), (1, (2, 4)))
"""Worlds, and those whose checkpoints they load. Going up every layout saves what the later ones load; going
down, the smaller worlds load what the larger ones have saved since."""


def journey(root: Path, nodes: dict[str, dict[str, Any]]) -> list[str]:
    """Every world in turn, in the same four processes: starting them is what takes the time."""
    rank, wrong = dist.get_rank(), []
    for number, (world, worlds) in enumerate(JOURNEY):
        dist.barrier()
        dist.destroy_process_group()
        if rank < world:
            join(root / f"store-{number}", rank, world)
            if number == 0:
                start(root, nodes)
            wrong += relay(root, nodes, worlds)
            dist.destroy_process_group()
        join(root / f"store-{number}-all", rank, 4)
    return wrong


def join(store: Path, rank: int, world: int) -> None:
    timeout = timedelta(seconds=TIMEOUT_S)
    store_of_group = dist.FileStore(str(store), world)
    dist.init_process_group("gloo", store=store_of_group, rank=rank, world_size=world, timeout=timeout)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_layout_loads_what_every_layout_saved(tmp_path: Path) -> None:
    configs = {
        case: resolved(compose("pretrain", [*TINY, *overrides(case), "model.text.num_hidden_layers=1"]).node)
        for case in CASES
    }
    nodes = {case: config["model"] for case, config in configs.items()}
    ranks = run_ranks(journey, 4, tmp_path, nodes, timeout=TIMEOUT_S)
    assert [line for lines in ranks for line in lines] == []

    folders = []
    for layout in EVEN:
        run = tmp_path / "even" / layout.name
        save_config(configs["even"], run / "config.yaml")
        folders.append(tmp_path / "hub" / layout.name)
        export(run, folders[-1], torch.bfloat16, 200_000, lambda line: None)
    expected = files(folders[0])
    assert len(expected) > 5
    for folder in folders[1:]:
        assert files(folder) == expected, folder.name
