"""Exit codes are part of the contract."""

from cantata.core.errors import CantataError, ConfigError, RunError


def test_bad_usage_leaves_with_2_and_a_failed_run_with_1() -> None:
    assert (ConfigError("x").exit_code, RunError("x").exit_code, CantataError("x").exit_code) == (2, 1, 1)
    assert issubclass(ConfigError, CantataError)
    assert issubclass(RunError, CantataError)
    assert not issubclass(ConfigError, RunError)
