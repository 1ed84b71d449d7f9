"""Programs of the system that some tests need: present, or skipped with the reason, or required."""

import os
import shutil

import pytest

REQUIRED = "CANTATA_REQUIRE_SYSTEM_TOOLS"


def need(*programs: str) -> None:
    """Skip the test that calls this where a program is absent; fail it where `REQUIRED` is set."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    absent = [name for name in programs if shutil.which(name, path=search) is None]
    if not absent:
        return
    reason = f"{', '.join(absent)} not found; `make system-tools` installs what such tests need on Debian"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason}, and {REQUIRED} is set")
    pytest.skip(reason)
