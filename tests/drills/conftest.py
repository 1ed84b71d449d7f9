"""The run that every drill of one process is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.runs import SETTINGS
from tests.recipes.runner import pretrain


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same command, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(out, *SETTINGS) == 0
    return out
