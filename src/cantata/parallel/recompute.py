"""Trade time for memory: forget activations and compute them again in backward."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint


class Recompute(Enum):
    """What a block forgets in forward and computes again in backward."""

    none = "none"
    selective = "selective"
    """Keeps the outputs of matrix products, grouped products, attention and exchanges; the rest is cheap."""
    full = "full"
    """Keeps the block's input and its routing only."""


# A second top-k over logits that differ in their last bit could pick other experts than forward did.
_ROUTING = frozenset({"aten::topk"})
_EXCHANGE = "_c10d_functional::all_to_all_single"
_COSTLY = _ROUTING | {
    _EXCHANGE,
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "cantata::experts",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn",
    "flex_attention",
}


def apply_recompute(module: nn.Module, mode: Recompute) -> None:
    """Make a block recompute its activations; the names of its parameters stay as they are.

    The forward itself is replaced on the instance, below any hook, so whatever gathers parameters
    around the block also serves the second run.
    """
    if mode is Recompute.none:
        return
    contexts = partial(_contexts, _ROUTING if mode is Recompute.full else _COSTLY)
    forward: Callable[..., Any] = module.forward

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    module.forward = recomputing


def _contexts(kept: frozenset[str]) -> tuple[_Keep, _Recall]:
    """The modes of the first and of the second run.

    Torch's own selective modes (2.13) refuse operators that only the second run sees, and experts that are
    sharded as a group of their own gather their parameters inside the block.
    """
    results: Results = defaultdict(deque)
    return _Keep(kept, results), _Recall(kept, results)


Results = defaultdict[Any, deque[Any]]
"""What each kept operator returned, call by call, and the random state after one that drew numbers."""


class _Keep(TorchDispatchMode):
    """Remembers what the kept operators return."""

    def __init__(self, kept: frozenset[str], results: Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_kept(self.kept, func, args):
            self.results[func].append((tree_map_only(Tensor, _Remembered, result), _random_state(func, args)))
        return result


class _Recall(TorchDispatchMode):
    """Returns what was remembered instead of running a kept operator again."""

    def __init__(self, kept: frozenset[str], results: Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _is_kept(self.kept, func, args):
            return func(*args, **(kwargs or {}))
        result, random_state = self.results[func].popleft()
        if random_state is not None:
            generator, state = random_state
            generator.set_state(state)
        return tree_map_only(_Remembered, _Remembered.recall, result)


class _Remembered:
    """A result without its graph."""

    def __init__(self, result: Tensor) -> None:
        # Below autograd a detached tensor would count its versions by itself and hide a change in place.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.value = result.detach()
        self.version = self.value._version

    def recall(self) -> Tensor:
        if self.value._version != self.version:
            raise RuntimeError("a result that recomputation keeps was changed in place")
        return self.value


def _random_state(operator: Any, args: Sequence[Any]) -> tuple[torch.Generator, Tensor] | None:
    """The generator after an operator that drew from it: what comes behind must draw the same again."""
    tags = getattr(operator, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return None
    device = next(value.device for value in args if isinstance(value, Tensor))
    generator = (
        torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    )
    return generator, generator.get_state()


def _is_kept(kept: frozenset[str], operator: Any, args: Sequence[Any]) -> bool:
    name = operator._schema.name if isinstance(operator, torch._ops.OpOverload) else operator.name()
    # Exchanged integers are counts, a part of the routing; exchanged floats are activations.
    return name in kept or (name == _EXCHANGE and not args[0].is_floating_point())
