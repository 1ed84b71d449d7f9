"""Hydra's side of the config boundary: composing YAML, saying where a key stands, and why Hydra refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from cantata.core.errors import ConfigError
from cantata.core.locate import configs_dir
from cantata.core.schema import InvalidKey, Key
from cantata.core.suggest import hint

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""What Hydra and OmegaConf raise on bad YAML, groups and overrides."""


class _File(NamedTuple):
    label: str
    package: Key
    content: Any


class _Override(NamedTuple):
    text: str
    key: Key


class Origins:
    """The files and overrides of one composed config, in the order in which they were merged.

    Made while Hydra is initialised; nothing is read before a message needs it.
    """

    def __init__(self, config_name: str, overrides: Sequence[str]) -> None:
        self._loader: Any = GlobalHydra.instance().config_loader()
        self._config_name = config_name
        self._given = list(overrides)

    @cached_property
    def _files(self) -> list[_File]:
        repository = self._loader.repository
        defaults = self._loader.compute_defaults_list(self._config_name, self._given, RunMode.RUN).defaults
        return [
            _File(_label(found.path, default.config_path), _package(default.package), found.config)
            for default in defaults
            if (found := repository.load_config(default.config_path)) is not None
            if found.path.startswith("file:")
        ]

    @cached_property
    def _overrides(self) -> list[_Override]:
        return [
            _Override(str(override.input_line), tuple(override.key_or_group.split(".")))
            for override in OverridesParser.create().parse_overrides(self._given)
            if not self._loader.repository.group_exists(override.key_or_group)
        ]

    @staticmethod
    def of_run() -> Origins | None:
        """Those of the run that Hydra started; None outside of one."""
        if not HydraConfig.initialized():
            return None
        run = HydraConfig.get()
        return Origins(str(run.job.config_name), list(run.overrides.task))

    def locate(self, error: InvalidKey) -> str:
        """Where the user must look: an override, the last file that sets the key, or the one to add it to."""
        if error.holder is not None:
            return self._file(error.holder, self._files)
        for override in reversed(self._overrides):
            shorter = min(len(override.key), len(error.key))
            if override.key[:shorter] == tuple(str(part) for part in error.key[:shorter]):
                return f"override '{override.text}'"
        return self._file(error.key, reversed(self._files))

    def _file(self, key: Key, files: Iterable[_File]) -> str:
        holders = [file for file in files if _holds(file, key)]
        # A mapping is introduced by the first file that gives it values of its own.
        return holders[0].label if holders else self._files[-1].label


class Composed(NamedTuple):
    """A composed config and where its keys come from."""

    node: DictConfig
    origins: Origins


def compose(config_name: str, overrides: Sequence[str] = (), directory: Path | None = None) -> Composed:
    """Compose in this process, as the command would; raises `ConfigError` where Hydra refuses.

    `directory` stands in for the shipped configs.
    """
    folder = str((directory or configs_dir()).absolute())
    try:
        with hydra.initialize_config_dir(folder, version_base="1.3"):
            node = hydra.compose(config_name, overrides=list(overrides))
            return Composed(node, Origins(config_name, overrides))
    except COMPOSITION_ERRORS as error:
        raise explain(error, config_name, overrides, folder) from error


def explain(error: Exception, config_name: str, overrides: Sequence[str], folder: str) -> ConfigError:
    """Hydra's refusal as one line that names the override or file and the nearest valid name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return ConfigError(f"{group or 'config'}={name}: no such option{hint(name, error.options or [])}")
    if isinstance(error, OverrideParseException):
        quoted = "; keys are written without quotes" if re.search(r"[{,]\s*['\"]", error.override) else ""
        return ConfigError(f"override '{error.override}': {one_line(error.message)}{quoted}")
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        file = _label(*mark.name.removesuffix(".yaml").rpartition("/")[::2])
        return ConfigError(f"{file}:{mark.line + 1}: not valid YAML: {error.problem}")
    refused = re.match(r"Could not override '([^']+)'", str(error))
    if refused is not None:
        return _unknown(refused.group(1), str(error.__cause__), config_name, overrides, folder)
    given = f" (overrides: {' '.join(overrides)})" if overrides else ""
    return ConfigError(f"{one_line(error)}{given}")


def _unknown(given: str, cause: str, config_name: str, overrides: Sequence[str], folder: str) -> ConfigError:
    """The override of `given`, which is unknown itself or whose value, a mapping, holds an unknown key."""
    text = next((text for text in overrides if text.lstrip("+~").startswith(f"{given}=")), given)
    inside = re.search(rf"full_key: ({re.escape(given)}\.\S+)", cause)
    key = given if inside is None else inside.group(1)
    known = _known_keys(config_name, overrides, folder, with_sections="." not in key)
    if given in known and not any(name.startswith(f"{given}.") for name in known):
        return ConfigError(f"override '{text}': {given} is empty; to add to it, write '+{text}'")
    return ConfigError(f"override '{text}': {key} is not a known key{hint(key, known)}")


def one_line(error: object) -> str:
    """The first line of a library's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _known_keys(config_name: str, overrides: Sequence[str], folder: str, with_sections: bool) -> list[str]:
    """Sections and groups, or else every dotted key, of the config without its value overrides."""
    choices = [text for text in overrides if "." not in text.partition("=")[0]]
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        groups = [] if not with_sections else GlobalHydra.instance().config_loader().list_groups("")
        for attempt in (choices, []):
            try:
                node = hydra.compose(config_name, overrides=list(attempt))
            except COMPOSITION_ERRORS:
                continue
            if with_sections:
                return [*groups, *(str(key) for key in node)]
            return list(_dotted_keys(OmegaConf.to_container(node), ""))
    return groups


def _dotted_keys(content: Any, prefix: str) -> Iterable[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted_keys(value, f"{prefix}{key}.")


def _label(path: str, config_path: str) -> str:
    """A file's name for messages: the shipped ones as `configs/...`, wherever they are installed."""
    file = Path(path.removeprefix("file://"), config_path)
    shipped = file.is_relative_to(configs_dir())
    shown = Path("configs", file.relative_to(configs_dir())) if shipped else file
    return f"{str(shown).removesuffix('.yaml')}.yaml"


def _package(text: str | None) -> Key:
    return () if text in (None, "", "_global_") else tuple(str(text).split("."))


def _holds(file: _File, key: Key) -> bool:
    if key[: len(file.package)] != file.package:
        return False
    content: Any = OmegaConf.to_container(file.content)
    for part in key[len(file.package) :]:
        if not isinstance(content, dict) or part not in content:
            return isinstance(content, list)
        content = content[part]
    return True
