"""The two ways a command fails, each one line for the user and one exit code."""

PREEMPTED = 75
"""Exit code of a run that saved a complete checkpoint and wants the same command again (EX_TEMPFAIL)."""


class CantataError(Exception):
    """A failure with a one-line message that names what, where and what to do."""

    exit_code = 1


class ConfigError(CantataError):
    """Bad configuration or usage, found before anything is built."""

    exit_code = 2


class RunError(CantataError):
    """A run that started and cannot go on."""
