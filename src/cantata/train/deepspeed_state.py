"""The state of a DeepSpeed engine under names that know no layout.

Every tensor becomes whole, one at a time, and moves to the host memory of one rank, its owner.
Owners take turns, so the state of N trained parameters needs about 12 N / world bytes of host
memory on each rank (masters and two moments in fp32) and, on the device, one parameter in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata.core.dist import all_reduce_sum, gather_strings
from cantata.core.errors import ConfigError, RunError
from cantata.parallel.materialize import Source, fill, persistent_tensors
from cantata.train.deepspeed_stage import Fragment, Stage
from cantata.train.ema import adam_state

_STEP = "step"


class WholeState:
    """Reads and writes the weights, optimizer states and buffers of a stage as whole tensors."""

    def __init__(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
    ) -> None:
        """`shapes` are those of every parameter, taken before ZeRO-3 hid them.

        Raises:
            ConfigError: the optimizer is not of the Adam family.
        """
        self.stage = stage
        self.model = model
        self.optimizer = optimizer
        self.shapes = shapes
        self.device = device
        self.saved = {name for name, _ in persistent_tensors(model)}
        self.buffers = {name: buffer for name, buffer in model.named_buffers() if name in self.saved}
        self.moments = start_adam(optimizer, stage.flats())
        # Every trained parameter takes part in every update, so one count is true of all.
        self.counts = [f"optimizer.{name}.{_STEP}" for name in stage.trained]
        keys = [key for key, _, _ in self._entries()]
        keys += [f"model.{name}" for name in self.buffers] + self.counts
        self.owners = {key: index % dist.get_world_size() for index, key in enumerate(keys)}

    @torch.no_grad()
    def fill(self, source: Source) -> None:
        """Write every parameter in fp32 into its master, and round the masters into the model's weights.

        A rank reads only the rows that its fragment touches, of experts only its own. `source` holds the
        buffers too.
        """
        for flat in self.stage.flats():
            flat.zero_()
        for name, shape in self.shapes.items():
            fragment = self.stage.fragments.get(name)
            if self._is_partitioned_frozen(name):
                self.stage.write_partitioned(name, source.read(name, _all(shape)))
            elif fragment is not None:
                rows, within = fragment.rows(shape)
                part = source.read(name, (rows, *_all(shape[1:])) if shape else ())
                fragment.of(fragment.flat).copy_(part.reshape(-1)[within])
        for name, buffer in self.model.named_buffers():
            fill(buffer, name, source)
        self.stage.refresh()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors in host memory, each on its owner alone; a collective."""
        state = {}
        for key, name, moment in self._entries():
            value = self._read(name, moment, self.owners[key])
            if value is not None:
                state[key] = value.view(self.shapes[name]).to("cpu", copy=True)
        for name, buffer in self.buffers.items():
            if self._owns(f"model.{name}"):
                state[f"model.{name}"] = buffer.to("cpu", copy=True)
        for key in self.counts:
            if self._owns(key):
                state[key] = self._state(self.stage.flats()[0])[_STEP].to("cpu", copy=True)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of `state_dict`, each from its owner; a collective.

        Raises:
            RunError: a tensor is missing, or parameters were updated unequally often.
        """
        missing = [key for key, owner in self.owners.items() if owner == dist.get_rank() and key not in state]
        everywhere = [names for names in gather_strings(", ".join(missing[:8])) if names]
        if everywhere:
            raise RunError(f"checkpoint lacks {'; '.join(everywhere)}; it is of another model or optimizer")
        for key, name, moment in self._entries():
            value = torch.empty(self.shapes[name], dtype=self._dtype(name), device=self.device)
            self._write(name, moment, self._broadcast(key, state, value))
        for name, buffer in self.buffers.items():
            self._broadcast(f"model.{name}", state, buffer)
        self._load_counts(state)
        self.stage.refresh()

    def _entries(self) -> Iterator[tuple[str, str, str | None]]:
        """Key, parameter and moment (None: the parameter itself) of every whole tensor."""
        for name in self.shapes:
            if name in self.saved:
                yield f"model.{name}", name, None
        for name in self.stage.trained:
            for moment in self.moments:
                yield f"optimizer.{name}.{moment}", name, moment

    def _owns(self, key: str) -> bool:
        return self.owners[key] == dist.get_rank()

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.stage.trained else self.stage.frozen[name].dtype

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.optimizer.state[flat]
        return state

    def _part(self, fragment: Fragment, moment: str | None) -> Tensor:
        return fragment.of(fragment.flat if moment is None else self._state(fragment.flat)[moment])

    def _read(self, name: str, moment: str | None, owner: int) -> Tensor | None:
        """The whole tensor on its owner, None elsewhere."""
        is_owner = owner == dist.get_rank()
        if self._is_partitioned_frozen(name):
            whole = self.stage.read_partitioned(name)
        elif is_owner or self.stage.is_split(name):
            whole = torch.zeros(self.shapes[name].numel(), dtype=self._dtype(name), device=self.device)
            fragment = self.stage.fragments.get(name)
            if fragment is not None and self.stage.is_giver(name, owner):
                fragment.within(whole).copy_(self._part(fragment, moment))
            if self.stage.is_split(name):
                # Fragments do not overlap: adding bits to zeros keeps every bit, that of -0.0 too.
                bits = torch.int32 if whole.element_size() == 4 else torch.uint8
                dist.reduce(whole.view(bits), owner)
        return whole if is_owner else None

    def _write(self, name: str, moment: str | None, value: Tensor) -> None:
        fragment = self.stage.fragments.get(name)
        if self._is_partitioned_frozen(name):
            self.stage.write_partitioned(name, value)
        elif fragment is not None:
            self._part(fragment, moment).copy_(fragment.within(value))

    def _is_partitioned_frozen(self, name: str) -> bool:
        return name in self.stage.frozen and name not in self.stage.copied

    def _broadcast(self, key: str, state: Mapping[str, Tensor], into: Tensor) -> Tensor:
        if self._owns(key):
            into.copy_(state[key])
        dist.broadcast(into, self.owners[key])
        return into

    def _load_counts(self, state: Mapping[str, Tensor]) -> None:
        owned = [float(state[key]) if self._owns(key) else 0.0 for key in self.counts]
        counts = set(all_reduce_sum(owned))
        if len(counts) > 1:
            raise RunError(
                f"the checkpoint's parameters were updated unequally often ({min(counts):g} to "
                f"{max(counts):g} times); DeepSpeed keeps one count for all: continue with engine=fsdp2"
            )
        for flat in self.stage.flats():
            self._state(flat)[_STEP].fill_(counts.copy().pop())


def start_adam(optimizer: torch.optim.Optimizer, flats: Sequence[Tensor]) -> list[str]:
    """Make the state that the first step would make, so that checkpoints always hold and find all of it.

    Returns the names of the moments.

    Raises:
        ConfigError: the optimizer is not of the Adam family, whose state starts from zeros.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        name = type(optimizer).__name__
        raise ConfigError(f"optimizer={name}: deepspeed supports torch.optim.AdamW and Adam")
    rules = optimizer.param_groups[0]
    for flat in flats:
        optimizer.state[flat] = adam_state(optimizer, rules, flat)
    return [name for name in optimizer.state[flats[0]] if name != _STEP]


def _all(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)
