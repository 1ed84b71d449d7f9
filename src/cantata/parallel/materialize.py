"""Give a model on the meta device its storage and values, one tensor at a time.

The value of a tensor depends on its name and the seed (or the checkpoint it comes from), never on
how it is sharded: the same model starts from the same bits on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cantata.core.errors import RunError
from cantata.models.lora import base_names
from cantata.nn.lora import LoRAEmbedding, fill_factor, is_factor

Index = tuple[slice, ...]


class Source(Protocol):
    """Where values come from: random numbers, or a published checkpoint."""

    def __iter__(self) -> Iterator[str]:
        """The names it holds, in the order that is fastest to read."""
        ...

    def read(self, name: str, index: Index) -> Tensor:
        """The part `index` of the whole tensor `name`; an empty index is all of a scalar."""
        ...


@runtime_checkable
class Initializable(Protocol):
    """What materialising needs of a model."""

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a whole (unsharded) parameter or buffer with its initial values."""
        ...


class RandomInit:
    """Initial values, drawn whole on the host in fp32 so that every layout and device gets the same.

    A model fills its own tensors, `nn.lora` the factors of adapters.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        """Take shapes from `model` (meta and sharded will do), values from its `init_parameter`."""
        if not isinstance(model, Initializable):
            raise TypeError(f"{type(model).__name__} lacks init_parameter; see cantata.models.protocol")
        self._model: Initializable = model
        self._seed = seed
        self._adapted_embeddings = {
            name for name, part in model.named_modules() if isinstance(part, LoRAEmbedding)
        }
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._specs = {
            name: (tensor.shape, torch.float32 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def read(self, name: str, index: Index) -> Tensor:
        shape, dtype = self._specs[name]
        whole = torch.empty(shape, dtype=dtype)
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        # manual_seed takes 63 bits without a sign.
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        with torch.no_grad():
            if is_factor(name):
                parent, _, leaf = name.rpartition(".")
                fill_factor(leaf, whole, generator, embedding=parent in self._adapted_embeddings)
            else:
                self._model.init_parameter(name, whole, generator)
        return whole[index] if index else whole


class Assembled:
    """Parts read from folders of their own, and the rest of another source."""

    def __init__(self, rest: Source, parts: Sequence[Source]) -> None:
        self._rest = rest
        self._parts = parts
        self._owner = {name: part for part in parts for name in part}

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from part
        yield from (name for name in self._rest if name not in self._owner)

    def read(self, name: str, index: Index) -> Tensor:
        """See `Source`."""
        return self._owner.get(name, self._rest).read(name, index)


class InitialValues:
    """A source completed by the model itself: buffers that `source` lacks start as `init_parameter` says.

    Published checkpoints hold neither tables that follow from the config nor a balance bias.
    """

    def __init__(self, model: nn.Module, source: Source) -> None:
        self._source = source
        self._order = list(source)
        self._held = set(self._order)
        self._own = RandomInit(model, seed=0)
        self._buffers = {name for name, _ in model.named_buffers()}

    def __iter__(self) -> Iterator[str]:
        yield from self._order
        yield from sorted(self._buffers - self._held)

    def read(self, name: str, index: Index) -> Tensor:
        """Raises `RunError` for a parameter that the source lacks."""
        if name in self._held:
            return self._source.read(name, index)
        if name not in self._buffers:
            raise RunError(f"parameter {name} has no initial value: its source does not hold it")
        return self._own.read(name, index)


def materialize(
    model: nn.Module, source: Source, device: torch.device, parameter_device: torch.device | None = None
) -> None:
    """Allocate every tensor of a meta model, sharded or not, and fill it: see `InitialValues`.

    A rank asks `source` for its own shard only, one tensor at a time.

    Args:
        device: where the tensors go.
        parameter_device: where the parameters go instead, when they are offloaded.

    Raises:
        RunError: `source` lacks a parameter.
    """
    values = InitialValues(model, source)
    _allocate(model, device, parameter_device or device)
    place = {name: position for position, name in enumerate(values)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors.sort(key=lambda item: place.get(item[0], -1))
    with torch.no_grad():
        for name, tensor in tensors:
            fill(tensor, name, values)


def persistent_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then the buffers that are saved with the model; a shared one once, by its first name.

    Without what an adapted model keeps as it came (`models.lora.base_names`): that is read again.
    """
    base = base_names(model)
    yield from ((name, parameter) for name, parameter in model.named_parameters() if name not in base)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _allocate(model: nn.Module, device: torch.device, parameter_device: torch.device) -> None:
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    model.to_empty(device=parameter_device)
    # to_empty makes a parameter per name; a shared one must stay one.
    for first, *others in tied.values():
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))
    if parameter_device != device:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))


def fill(tensor: Tensor, name: str, source: Source) -> None:
    """Write what this rank holds of a tensor."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(source.read(name, tuple(slice(0, size) for size in tensor.shape)))
        return
    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if all(shape):
        index = tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
        tensor.to_local().copy_(source.read(name, index))
