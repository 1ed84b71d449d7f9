"""Writes an adapter in PEFT's format, so that `peft.PeftModel` computes with it what our model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cantata.core.errors import ConfigError, RunError
from cantata.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cantata.models.adapter_names import PREFIX, Target, adapter_targets, hub_parameters, saved_parameters
from cantata.models.hub import listed
from cantata.models.lora import LoRAConfig
from cantata.models.protocol import EmbedsTokens, HubLayout
from cantata.nn.lora import dora_magnitude

NO_DROPOUT = "lora_dropout is written as 0, since PEFT has no dropout on experts; it counts in training alone"


class AdapterWriter:
    """An adapted model's adapter, to be written.

    Args:
        model: adapted; the meta device will do.
        layout: the family's names.
        config: what it was adapted with.
        base: what PEFT shall take for the name or folder of the weights that it adapts.

    Raises:
        ConfigError: PEFT has no place for something in it; says what, and what to do.
    """

    def __init__(self, model: nn.Module, layout: HubLayout, config: LoRAConfig, base: str | None) -> None:
        self._targets = adapter_targets(model, layout)
        self._config, self._base = config, base
        hub = list(hub_parameters(model, layout))
        saved = set(saved_parameters(model))
        self._modules = _outermost({key.rpartition(".")[0] for name, key, _ in hub if name in saved})
        self._whole = [entry for entry in hub if any(entry[1].startswith(f"{m}.") for m in self._modules)]
        self._check_ignored()
        self._check_dora()
        self._check_modules()
        _check_tied(model, layout, saved)

    def write(self, directory: Path, read: Callable[[str], Tensor], dtype: torch.dtype | None) -> list[str]:
        """Put the two files into `directory`; returns lines on what PEFT will do otherwise.

        Args:
            read: a whole factor or parameter of the model, by its native name.
            dtype: of the written tensors; None keeps what is read.

        Raises:
            RunError: the disk refuses.
        """
        tensors = {
            stored.key: stored.pack(_factor(target, name, read)).to(dtype)
            for target in self._targets
            for name, stored in target.stored.items()
        }
        tensors |= {
            PREFIX + key: read(n).reshape(shape).to(dtype).contiguous() for n, key, shape in self._whole
        }
        config = json.dumps(self.peft_config(), indent=2) + "\n"
        try:
            (directory / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
            save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise RunError(f"{directory}: the adapter cannot be written ({error})") from error
        return [NO_DROPOUT] if self._config.dropout and any(t.is_experts for t in self._targets) else []

    def peft_config(self) -> dict[str, Any]:
        """What goes into `adapter_config.json`; names are whole, so that nothing else is matched."""
        config = self._config
        parameters = [target.module for target in self._targets if target.is_experts]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base,
            "r": config.r,
            "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
            "lora_dropout": 0.0 if parameters else config.dropout,
            "use_rslora": config.rslora,
            "use_dora": config.dora,
            "target_modules": [target.module for target in self._targets if not target.is_experts],
            "target_parameters": parameters or None,
            "modules_to_save": self._modules or None,
            "rank_pattern": {t.module: t.rank for t in self._targets if t.rank != config.r},
            "alpha_pattern": {},
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _check_ignored(self) -> None:
        ignored = [target.name for target in self._targets if target.is_ignored]
        if ignored:
            raise ConfigError(
                f"PEFT would compute without the adapter of {listed(ignored)}, which is the output of an "
                "nn.MultiheadAttention in transformers: export a merged model with --merge"
            )

    def _check_dora(self) -> None:
        if not self._config.dora:
            return
        others = [target.name for target in self._targets if target.magnitude is None]
        if others:
            raise ConfigError(
                f"PEFT has DoRA for all targets or for none, and {len(others)} here cannot have it "
                f"({listed(others)}): export a merged model with --merge, or train without them or DoRA"
            )

    def _check_modules(self) -> None:
        for target in self._targets:
            inside = [m for m in self._modules if f"{target.module}.".startswith(f"{m}.")]
            if inside:
                raise ConfigError(
                    f"PEFT keeps {inside[0]} as a whole (lora.modules_to_save), so that the adapter of "
                    f"{target.name} in it would be lost: export a merged model with --merge"
                )


def _factor(target: Target, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """As PEFT means it: a magnitude itself, not its change."""
    return dora_magnitude(read(target.weight), read(name)) if name == target.magnitude else read(name)


def _check_tied(model: nn.Module, layout: HubLayout, saved: set[str]) -> None:
    if not layout.hub_config()["tie_word_embeddings"] or not isinstance(model, EmbedsTokens):
        return
    if any(model.get_parameter(name) is model.token_embedding.weight for name in saved):
        raise ConfigError(
            "the tied embedding was trained in full (lora.modules_to_save), and PEFT would load it as the "
            "embedding alone, not as the head: export a merged model with --merge"
        )


def _outermost(modules: set[str]) -> list[str]:
    return sorted(
        m for m in modules if not any(m != other and m.startswith(f"{other}.") for other in modules)
    )
