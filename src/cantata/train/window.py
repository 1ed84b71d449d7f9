"""From the steps since the last log to one line of metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cantata.core.types import MODALITIES
from cantata.train.expert_metrics import expert_metrics
from cantata.train.flops import device_name, model_flops_utilisation, peak_flops
from cantata.train.image_metrics import USAGE, code_metrics
from cantata.train.memory import peak_memory_gib
from cantata.train.metrics import Record, loss_metrics, part_metrics
from cantata.train.reconstruction import STATISTICS

if TYPE_CHECKING:
    from cantata.train.loop import StepResult


@dataclass(frozen=True)
class Device:
    """What throughput and utilisation are measured against.

    Every rank drives one device, and all are of one kind.
    """

    device: torch.device
    world_size: int
    flops_per_token: Callable[[float], float] | None
    """Forward and backward operations of a token, given the mean length of the sample around a token;
    None leaves utilisation out."""

    @property
    def peak(self) -> float | None:
        return peak_flops(device_name(self.device))


class Window:
    """The steps since the last logged one.

    With `log_every` above 1 a line speaks for all of them: losses are sums over the window divided by the
    targets of the window (so tokens weigh the same, whatever step they fell in), experts are counted over the
    window, seconds are means per step. `grad_norm`, `learning_rate`, `tokens` and `target_tokens` are those
    of the logged step itself; the last two count from the beginning of the run, without padding.

    A checkpoint that falls inside a window keeps `state_dict()`, so a resumed run logs the same losses.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._timed = _Timed()

    def add(self, result: StepResult) -> None:
        """Take a finished step; its sums are reduced over ranks and on the host."""
        for name, value in result.sums.items():
            # What the quantiser learns from: large, and used up already.
            if name.startswith(STATISTICS):
                continue
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._timed.add(result)

    def record(self, result: StepResult, base_learning_rate: float) -> Record:
        """The line of the logged step, `result`, which was added before; starts the next window."""
        seconds, steps = self._timed.step_seconds, self._timed.steps
        record: Record = {
            "step": result.progress.step,
            "loss": None,
            "grad_norm": result.grad_norm,
            "learning_rate": base_learning_rate * result.learning_rate_factor,
            "tokens": result.progress.tokens,
            "target_tokens": result.progress.target_tokens,
            "tokens_per_second_per_device": self._timed.tokens / seconds / self._device.world_size,
            "step_seconds": seconds / steps,
            "data_seconds": self._timed.data_seconds / steps,
            "memory_gib": peak_memory_gib(self._device.device),
            "mfu": self._utilisation(),
        }
        record |= loss_metrics(self._sums)
        record |= router_metrics(self._sums)
        if "tokens_per_expert_LME" in self._sums:
            record |= expert_metrics(self._sums["tokens_per_expert_LME"])
        record |= part_metrics(self._sums)
        if USAGE in self._sums:
            record |= code_metrics(self._sums[USAGE])
        self._clear()
        return record

    def _utilisation(self) -> float | None:
        if self._device.flops_per_token is None:
            return None
        flops = self._timed.tokens * self._device.flops_per_token(self._timed.mean_length)
        return model_flops_utilisation(
            flops, self._timed.step_seconds, self._device.world_size, self._device.peak
        )

    def state_dict(self) -> dict[str, Any]:
        """The sums of the unfinished window as plain JSON values; fp64 survives JSON to the last bit."""
        return {"sums": {name: value.tolist() for name, value in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the window of a checkpoint. Timing starts anew: it belongs to this process."""
        self._clear()
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}


class _Timed:
    """What throughput needs: only of steps that this process ran."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_seconds = 0.0
        self.data_seconds = 0.0
        self.tokens = 0
        self.squared_lengths = 0.0

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.step_seconds += result.step_seconds
        self.data_seconds += result.data_seconds
        self.tokens += result.totals.tokens
        self.squared_lengths += result.sums["squared_lengths"].item()

    @property
    def mean_length(self) -> float:
        """Length of the sample that a token stands in, mean over tokens: attention's cost follows it."""
        return self.squared_lengths / self.tokens


def router_metrics(sums: Mapping[str, Tensor]) -> Record:
    """The balance terms without their coefficients: means over tokens and layers.

    `router/aux_loss`, `router/z_loss`, `router/sequence_aux_loss` where it is used, and `router/aux_loss/<m>`
    for each modality that sent tokens, over its own tokens.
    """
    if "router/tokens_M" not in sums:
        return {}
    tokens_M = sums["router/tokens_M"].tolist()
    tokens = max(sum(tokens_M), 1)
    names = ("aux_loss", "z_loss", "sequence_aux_loss")
    record: Record = {
        f"router/{name}": sums[key].mean().item() / tokens
        for name in names
        if (key := f"router/{name}_L") in sums
    }
    for modality, sent, aux_L in zip(MODALITIES, tokens_M, sums["router/aux_loss_LM"].t(), strict=True):
        if sent:
            record[f"router/aux_loss/{modality}"] = aux_L.mean().item() / sent
    return record
