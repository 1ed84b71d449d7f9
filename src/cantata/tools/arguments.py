"""Command lines whose mistakes end in one line, like every other mistake of a user's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from cantata.core.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
