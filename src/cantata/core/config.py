"""The config boundary: crossed once, from composed YAML to typed values, before anything is built.

Closed parts of a config are dataclasses that stand beside the code that reads them. Open parts are
slots: mappings with a `_target_`, whose constructor's signature is the schema. Every key is held
against one or the other here, so that what comes past this file needs no check and has no default.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cantata.core import sweep
from cantata.core.compose import COMPOSITION_ERRORS, Composed, Origins, compose, explain, one_line
from cantata.core.dist import find_process
from cantata.core.errors import PREEMPTED, CantataError, ConfigError
from cantata.core.launcher import without_local_rank
from cantata.core.locate import configs_dir
from cantata.core.schema import InvalidKey, Key, bind, convert, dotted, slot

__all__ = [
    "Composed",
    "Slot",
    "Stage",
    "compose",
    "load",
    "missing_keys",
    "read_config",
    "resolved",
    "run_stage",
    "save_config",
    "slot",
    "stage_main",
]

T = TypeVar("T")

Slot = dict[str, Any]
"""A `_target_` node: plain, resolved values that `cantata.core.build.build` turns into an object."""

Stage = Callable[[DictConfig], int | None]
"""A recipe's main; the number it returns is the exit code."""

INTERRUPTED = 130

MANDATORY = "???"
"""YAML's mark of a value that the user must give."""


def load(node: DictConfig, schema: type[T], origins: Origins | None = None) -> T:
    """The composed config as an instance of `schema`, every key checked.

    `origins` names files in messages; inside a run they are Hydra's own. Raises `ConfigError`, one
    line with the file or override, the key and the nearest valid name.
    """
    try:
        _require_values(OmegaConf.to_container(node))
        loaded: T = convert(OmegaConf.to_container(node, resolve=True), schema, (), _check)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}{one_line(error)}") from error
    except InvalidKey as error:
        origins = origins or Origins.of_run()
        if origins is None:
            raise
        raise ConfigError(f"{origins.locate(error)}: {error}") from error
    return loaded


def resolved(node: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain values, interpolations filled in."""
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_config(config: Mapping[str, Any], path: Path) -> None:
    """Write resolved values as YAML in one piece; rank 0 alone does."""
    if find_process().rank != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".incomplete")
    unfinished.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    unfinished.replace(path)


def read_config(path: Path) -> dict[str, Any]:
    """What `save_config` wrote; `ConfigError` where there is none or it is no mapping."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no mapping of keys")
    return {str(key): value for key, value in content.items()}


def stage_main(config_name: str) -> Callable[[Stage], Callable[[], None]]:
    """Make a recipe's `main(node)` a command of Hydra's: overrides, `--cfg job`, `-m`, `--config-dir`."""

    def decorate(main: Stage) -> Callable[[], None]:
        @functools.wraps(main)
        def command() -> None:
            sys.exit(run_stage(main, config_name))

        return command

    return decorate


def run_stage(main: Stage, config_name: str) -> int:
    """Run `main` on the config of the command line; returns the exit code (see the public contract)."""
    codes: list[int] = []
    run_dirs = sweep.RunDirs()

    @functools.wraps(main)
    def task(node: DictConfig) -> None:
        if PREEMPTED not in codes:
            codes.append(_exit_code(lambda: _run_job(main, node, run_dirs)))
        if sweep.in_job():
            sweep.end_job(codes[-1])

    def command() -> None:
        # Otherwise Hydra prints its errors over many lines and leaves with its own code.
        full_error = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"
        sys.argv[1:] = without_local_rank(sys.argv[1:])
        try:
            sweep.check(get_args_parser().parse_args(), config_name)
            hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)(task)()
        except COMPOSITION_ERRORS as error:
            arguments = get_args_parser().parse_args()
            name = arguments.config_name or config_name
            raise explain(error, name, arguments.overrides, str(configs_dir())) from error
        finally:
            del os.environ["HYDRA_FULL_ERROR"]
            if full_error is not None:
                os.environ["HYDRA_FULL_ERROR"] = full_error

    return _exit_code(command) or max(codes, default=0)


def _run_job(main: Stage, node: DictConfig, run_dirs: sweep.RunDirs) -> int | None:
    """One job of a sweep, or the only one."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run_dirs.add(node.out)
    return main(node)


def _require_values(content: Any) -> None:
    """Raise `InvalidKey` where YAML's `???` leaves values to the user."""
    missing = list(missing_keys(content))
    if missing:
        others = f" (and so must: {', '.join(dotted(key) for key in missing[1:])})" if missing[1:] else ""
        raise InvalidKey(
            missing[0], f"must be given, for example on the command line: {dotted(missing[0])}=...{others}"
        )


def missing_keys(content: Any, key: Key = ()) -> Iterator[Key]:
    """The keys whose values YAML leaves to the user (`???`)."""
    if content == MANDATORY:
        yield key
    for name, value in content.items() if isinstance(content, dict) else ():
        yield from missing_keys(value, (*key, name))


def _check(node: dict[str, Any], key: Key, runtime: tuple[str, ...]) -> dict[str, Any]:
    bind(node, key, runtime, _check)
    return node


def _exit_code(call: Callable[[], int | None]) -> int:
    try:
        return call() or 0
    except CantataError as error:
        _complain(" ".join(str(error).split()), everywhere=not isinstance(error, ConfigError))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted", everywhere=False)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return 1


def _complain(message: str, everywhere: bool) -> None:
    """One line on stderr; every rank finds the same configuration errors, so rank 0 speaks for all."""
    try:
        rank = find_process().rank
    except ConfigError:
        rank = 0
    if rank == 0 or everywhere:
        sys.stderr.write(f"error: {f'rank {rank}: ' if rank else ''}{message}\n")
        sys.stderr.flush()
