"""An adapter merged into the weights that it adapts, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.models.adapter_files import Weights, whole
from cantata.models.adapter_names import Target, adapter_targets, hub_parameters, saved_parameters
from cantata.models.lora import LoRAConfig
from cantata.models.protocol import EmbedsTokens, HubLayout
from cantata.nn.head import LanguageHead
from cantata.nn.lora import LoRASettings, dora_weight, embedding_delta, experts_delta, linear_delta


class MergedWeights:
    """The parameters of the model without adapters that computes what the adapted one does.

    Sums are of fp32 (or wider) values and rounded once. Needs the memory of two of the largest weights.

    Args:
        model: adapted; the meta device will do.
        layout: the family's names.
        config: what it was adapted with.
        base: the weights that it adapts.
        adapter: a whole factor, or parameter saved in full, by its native name.
        dtype: of what is read; None keeps the base's.

    Raises:
        ConfigError: a tied embedding or head was adapted: one weight cannot be two.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: HubLayout,
        config: LoRAConfig,
        base: Weights,
        adapter: Callable[[str], Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._shapes = {name: model.get_parameter(name).shape for name, _, _ in hub_parameters(model, layout)}
        self._embeddings = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        self._saved = frozenset(saved_parameters(model))
        targets = adapter_targets(model, layout)
        self._targets = {target.weight: target for target in targets}
        self._settings: dict[str, LoRASettings] = {
            target.weight: config.settings(target.name, dora=target.magnitude is not None)
            for target in targets
        }
        _check_tied(model, layout, set(self._targets))

    def __iter__(self) -> Iterator[str]:
        yield from self._shapes

    def read(self, name: str) -> Tensor:
        """A whole parameter."""
        target = self._targets.get(name)
        if name in self._saved:
            # It may be adapted besides.
            weight, dtype = self._adapter(name), self._dtype or self._base_dtype(name)
        else:
            weight = self._base.read(name, whole(self._shapes[name]))
            dtype = self._dtype or weight.dtype
        return weight.to(dtype) if target is None else self._merge(weight, target, dtype)

    def _merge(self, weight: Tensor, target: Target, dtype: torch.dtype) -> Tensor:
        settings = self._settings[target.weight]
        a, b = (self._adapter(target.factor(letter)) for letter in "AB")
        if target.is_experts:
            merged = torch.empty_like(weight, dtype=dtype)
            # One expert after the other: in fp32, all of a large model's are twice its largest weight.
            for expert in range(len(weight)):
                delta = experts_delta(a[expert], b[expert], settings.scaling)
                merged[expert] = delta.add_(weight[expert])
            return merged
        if target.magnitude is not None:
            return dora_weight(weight, a, b, self._adapter(target.magnitude), settings.scaling).to(dtype)
        delta_of = embedding_delta if target.weight in self._embeddings else linear_delta
        return delta_of(a, b, settings.scaling).add_(weight).to(dtype)

    def _base_dtype(self, name: str) -> torch.dtype:
        return self._base.read(name, tuple(slice(0, 1) for _ in self._shapes[name])).dtype


def _check_tied(model: nn.Module, layout: HubLayout, weights: set[str]) -> None:
    if not layout.hub_config()["tie_word_embeddings"] or not isinstance(model, EmbedsTokens):
        return
    ends = [
        name
        for name, module in model.named_modules()
        if module is model.token_embedding or isinstance(module, LanguageHead)
    ]
    adapted = [name for name in ends if f"{name}.weight" in weights]
    if adapted:
        raise ConfigError(
            f"{adapted[0]} is adapted and shares its weight with the other end of the model, which merging "
            "would change as well: export the adapter without --merge"
        )
