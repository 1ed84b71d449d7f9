"""One order, and no silent combination."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from cantata.core.errors import ConfigError
from cantata.parallel import plan
from cantata.parallel.mesh import RankMesh
from cantata.parallel.recompute import Recompute
from tests.distributed.standin import build_on_meta

ONE = RankMesh(SimpleNamespace(device_type="cpu"), None)  # type: ignore[arg-type]


def test_recompute_then_compile_then_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_on_meta()
    calls: list[str] = []
    monkeypatch.setattr(plan, "apply_recompute", lambda module, mode: calls.append(f"recompute {mode.value}"))
    monkeypatch.setattr(plan, "apply_compile", lambda module, device: calls.append("compile"))
    monkeypatch.setattr(plan, "apply_sharding", lambda model, units, mesh, sharding: calls.append("shard"))
    sharding = object()
    plan.apply_plan(model, recompute=Recompute.none, compile=True, mesh=ONE, sharding=sharding)  # type: ignore[arg-type]
    assert calls == ["recompute none", "compile"] * 2 + ["shard"]


def test_only_blocks_are_touched() -> None:
    model = build_on_meta()
    plan.apply_plan(model, recompute=Recompute.full, compile=False, mesh=ONE, sharding=None)
    assert all("forward" in vars(block) for block in model.blocks)
    assert "forward" not in vars(model.embedding)
    assert "forward" not in vars(model.head)


def test_recompute_under_compile_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile=true with train\.recompute=selective"):
        plan.apply_plan(build_on_meta(), recompute=Recompute.selective, compile=True, mesh=ONE, sharding=None)


def test_a_foreign_model_is_named() -> None:
    with pytest.raises(TypeError, match="Linear lacks units"):
        plan.apply_plan(nn.Linear(1, 1), recompute=Recompute.none, compile=False, mesh=ONE, sharding=None)
