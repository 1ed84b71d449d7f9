"""Adapters in PEFT's format, read by native names: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.schema import convert
from cantata.models.adapter_names import PREFIX, Target, adapter_targets, hub_parameters, saved_parameters
from cantata.models.hub import listed, read_json
from cantata.models.lora import LoRAConfig, apply_lora
from cantata.models.protocol import EmbedsTokens, HubLayout
from cantata.nn.lora import Packing, magnitude_change

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SETTINGS: dict[str, tuple[Any, Any]] = {
    "r": (int, 8),
    "lora_alpha": (float, 8),
    "lora_dropout": (float, 0.0),
    "use_rslora": (bool, False),
    "use_dora": (bool, False),
    "rank_pattern": (dict[str, int], {}),
    "alpha_pattern": (dict[str, float], {}),
    "target_modules": (str | list[str], []),
    "target_parameters": (list[str], []),
}
"""The type of a key, and what it means that a config leaves it out or says null."""

_NOT_BUILT = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings that change what an adapter computes, unless they are off."""

_CHANGES_BASE = ("corda", "loftq", "lora_ga", "mica", "olora", "pissa")
"""Ways to begin an adapter after which its file fits only weights that were changed then."""


class Weights(Protocol):
    """Where the weights that an adapter adapts are read: random values, or a published checkpoint."""

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The part `index` of the whole tensor `name`."""
        ...


def whole(shape: Sequence[int]) -> tuple[slice, ...]:
    """The index of all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def is_adapter(directory: Path) -> bool:
    """Whether `directory` holds an adapter in PEFT's format."""
    return (directory / ADAPTER_CONFIG).is_file()


class AdapterReader:
    """An adapter in PEFT's format as the values of an adapted model's factors and `modules_to_save`.

    PEFT also keeps whole modules of which we train a part, and embeddings and heads beside their factors:
    what an adapter's file holds of the base must be the base's.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        layout: the family's names.
        model: adapted; meta and sharded ones too.
        config: what it was adapted with.
        base: the weights that the model adapts.

    Raises:
        ConfigError: in one line, the settings that differ and the keys that are missing, unexpected or of
            another shape; or a file that cannot be read.
    """

    def __init__(
        self, directory: str | Path, layout: HubLayout, model: nn.Module, config: LoRAConfig, base: Weights
    ) -> None:
        self.directory = Path(directory)
        self._settings = read_adapter_config(self.directory)
        self._file = _open(self.directory / ADAPTER_WEIGHTS)
        self._targets = adapter_targets(model, layout)
        self._stored = {name: stored for target in self._targets for name, stored in target.stored.items()}
        self._base = base
        self._magnitudes = {t.magnitude: t.weight for t in self._targets if t.magnitude is not None}
        parameters = {name: (key, shape) for name, key, shape in hub_parameters(model, layout)}
        self._saved = {
            name: (PREFIX + parameters[name][0], model.get_parameter(name).shape)
            for name in saved_parameters(model)
        }
        expected = {stored.key: stored.shape for stored in self._stored.values()}
        expected |= {PREFIX + parameters[name][0]: parameters[name][1] for name in self._saved}
        problems = [*self._other_settings(config), *self._other_keys(expected, model, layout)]
        if problems:
            found = "; ".join(problems)
            raise ConfigError(f"{self.directory}: the adapter does not fit the model and lora.*: {found}")

    def __iter__(self) -> Iterator[str]:
        """Native names of factors and of parameters saved in full."""
        yield from self._stored
        yield from self._saved

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A factor or a parameter, or the slice `index` of it, in the dtype of the file."""
        if name in self._stored:
            stored = self._stored[name]
            value = stored.unpack(self._file.get_tensor(stored.key))[index].contiguous()
            if name in self._magnitudes:
                return magnitude_change(self._base.read(self._magnitudes[name], (*index, slice(None))), value)
        else:
            key, shape = self._saved[name]
            value = self._file.get_tensor(key).reshape(shape)[index]
        return value

    def _other_settings(self, config: LoRAConfig) -> Iterator[str]:
        for key, ours in (("use_rslora", config.rslora), ("use_dora", config.dora)):
            theirs = self._settings[key]
            if theirs != ours:
                yield f"{key} is {json.dumps(theirs)}, lora.{key[4:]}={json.dumps(ours)}"
        found = [(t, *_rank_and_alpha(self._settings, t.module)) for t in self._targets]
        ranks = [f"{t.name} {rank} instead of {t.rank}" for t, rank, _ in found if rank != t.rank]
        alphas = [f"{t.name} {alpha:g}" for t, _, alpha in found if alpha != config.alpha]
        if ranks:
            yield f"{len(ranks)} of another rank: {listed(ranks)}"
        if alphas:
            yield f"{len(alphas)} of another alpha than lora.alpha={config.alpha:g}: {listed(alphas)}"

    def _other_keys(
        self, expected: Mapping[str, torch.Size], model: nn.Module, layout: HubLayout
    ) -> Iterator[str]:
        held = set(self._file.keys())
        ignored = {t.stored[t.factor("B")].key for t in self._targets if t.is_ignored}
        copies = _copies(model, layout)
        unexpected, misshapen, changed, unused = list[str](), list[str](), list[str](), list[str]()
        for key in sorted(held):
            name = copies.get(key)
            shape = expected.get(key)
            if shape is None and name is not None:
                if not self._is_of_base(key, model.get_parameter(name).shape, name):
                    changed.append(key)
            elif shape is None:
                unexpected.append(key)
            elif tuple(self._file.get_slice(key).get_shape()) != tuple(shape):
                misshapen.append(f"{key} {self._file.get_slice(key).get_shape()} instead of {list(shape)}")
            elif key in ignored and self._file.get_tensor(key).any():
                unused.append(key)
        kinds = {
            "missing": [key for key in expected if key not in held],
            "unexpected": unexpected,
            "misshapen": misshapen,
            "other than in the base": changed,
            "not zero that PEFT computes without": unused,
        }
        yield from (f"{len(keys)} {what}: {listed(keys)}" for what, keys in kinds.items() if keys)

    def _is_of_base(self, key: str, shape: torch.Size, name: str) -> bool:
        held, own = self._file.get_tensor(key), self._base.read(name, whole(shape))
        return held.numel() == shape.numel() and torch.equal(held.reshape(shape), own.to(held))


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """What `adapter_config.json` says, with PEFT's values for what it leaves out.

    Raises `ConfigError` where there is none, a value is of a wrong type, or it is of an adapter that is not
    built here.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise ConfigError(f"{directory}: no {ADAPTER_CONFIG}; give the folder of an adapter in PEFT's format")
    settings = {key: absent for key, (_, absent) in _SETTINGS.items()}
    settings |= {key: value for key, value in read_json(path).items() if value is not None}
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {settings.get('peft_type')!r}; only 'LORA' is supported")
    for key, (kind, _) in _SETTINGS.items():
        try:
            convert(settings[key], kind, (key,), lambda node, name, runtime: node)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    others = [f"{key}={settings[key]!r}" for key in _NOT_BUILT if settings.get(key)]
    if settings.get("bias", "none") != "none":
        others.append(f"bias={settings['bias']!r}")
    begun = settings.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.startswith(_CHANGES_BASE):
        others.append(f"init_lora_weights={begun!r}, which changes the base's weights")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in settings[name]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{path}: {name}: {pattern!r} is no pattern ({error})") from error
    if others:
        raise ConfigError(f"{path}: not supported here: {'; '.join(others)}")
    return settings


def read_lora_config(directory: str | Path, layout: HubLayout, model: nn.Module) -> LoRAConfig:
    """The `lora` section that describes an adapter on disk, without dropout.

    Args:
        model: without adapters, on the meta device; it stays as it is.

    Raises `ConfigError` where the folder cannot be read, or its targets differ in alpha.
    """
    path = Path(directory)
    settings, file = read_adapter_config(path), _open(path / ADAPTER_WEIGHTS)
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    everything = LoRAConfig(
        r=1,
        alpha=1.0,
        dropout=0.0,
        rslora=settings["use_rslora"],
        dora=settings["use_dora"],
        targets=["*"],
        ranks={},
        modules_to_save=[],
        adapter=None,
        quantize_base=Packing.none,
    )
    adapted = deepcopy(model)
    apply_lora(adapted, everything)
    found = {target.name: target for target in adapter_targets(adapted, layout)}
    ranks = {name: rank for name, target in found.items() if (rank := _rank_of(target, settings, shapes))}
    if not ranks:
        raise ConfigError(f"{path}: none of its {len(shapes)} keys adapts a part of {type(model).__name__}")
    alphas = {_rank_and_alpha(settings, found[name].module)[1] for name in ranks}
    if len(alphas) > 1:
        listed_alphas = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        raise ConfigError(f"{path / ADAPTER_CONFIG}: alphas {listed_alphas}; only one for all is supported")
    saved = [name for name, key, _ in hub_parameters(model, layout) if PREFIX + key in shapes]
    return replace(
        everything,
        r=max(ranks.values()),
        alpha=alphas.pop(),
        targets=list(ranks),
        ranks={name: rank for name, rank in ranks.items() if rank != max(ranks.values())},
        modules_to_save=saved,
    )


def _rank_of(target: Target, settings: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The rank that a file has for what was adapted with rank 1; 0 where it does not adapt that."""
    stored = target.stored[target.factor("A")]
    if not target.is_experts:
        return shapes.get(stored.key, (0,))[0]
    named = settings["target_parameters"]
    if not any(target.module == name or target.module.endswith(f".{name}") for name in named):
        return 0
    # A matrix that is adapted alone is wrapped by nothing.
    outer = stored.key.replace(".base_layer", "")
    key = stored.key if stored.key in shapes else outer
    return shapes.get(key, (0,))[0] // stored.shape[0]


def _rank_and_alpha(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """What a config gives a module; a pattern matches its whole name or what follows one of the dots."""
    values = []
    for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        matching = (v for key, v in settings[patterns].items() if re.match(rf"(.*\.)?({key})$", module))
        values.append(next(matching, settings[default]))
    return int(values[0]), float(values[1])


def _copies(model: nn.Module, layout: HubLayout) -> dict[str, str]:
    """Native names of the base's parameters, by the keys under which an adapter's file may hold them too."""
    names = {key: name for name, key, _ in hub_parameters(model, layout)}
    if layout.hub_config()["tie_word_embeddings"] and isinstance(model, EmbedsTokens):
        embedding = next(name for name, module in model.named_modules() if module is model.token_embedding)
        names["lm_head.weight"] = f"{embedding}.weight"
    wrapped = {
        f"{m}.base_layer.{leaf}": name for key, name in names.items() for m, _, leaf in [key.rpartition(".")]
    }
    return {PREFIX + key: name for key, name in (names | wrapped).items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
