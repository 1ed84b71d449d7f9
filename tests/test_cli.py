from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cantata import __version__, cli
from cantata.cli import VERBS, Verb, main
from cantata.core.errors import ConfigError, RunError
from cantata.core.locate import recipes_dir


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and verb.summary in shown for name, verb in VERBS.items())


def test_without_a_verb_the_usage_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: cantata VERB" in capsys.readouterr().err


def test_a_misspelt_verb_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: pretrian is not a verb of cantata; nearest: pretrain\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cantata {__version__}\n"


def test_help_needs_no_torch() -> None:
    code = "import sys; from cantata.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.recipe])
def test_recipes_exist(verb: str) -> None:
    assert (recipes_dir() / str(VERBS[verb].recipe)).is_file()


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.module])
def test_modules_take_their_own_arguments(verb: str) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0


def test_a_recipe_runs_as_if_started_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stage.py").write_text("import sys\nif __name__ == '__main__': sys.exit(len(sys.argv))\n")
    monkeypatch.setattr(cli, "recipes_dir", lambda: tmp_path)
    monkeypatch.setitem(VERBS, "stage", Verb("Test.", recipe="stage.py"))
    with pytest.raises(SystemExit) as left:
        main(["stage", "a=1", "b=2"])
    assert left.value.code == 3


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("no such folder"), 2, "error: no such folder\n"),
        (RunError("they differ"), 1, "error: they differ\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_a_tool_fails_with_one_line_and_its_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Module:
        @staticmethod
        def main(arguments: list[str]) -> int:
            assert arguments == ["x"]
            raise error

    monkeypatch.setattr(cli, "import_module", lambda name: Module)
    assert main(["verify", "x"]) == code
    assert capsys.readouterr().err == line


_WRITES = """
import sys
from cantata import cli

class Module:
    @staticmethod
    def main(arguments):
        for _ in range({times}):
            sys.stdout.write("words " * 100)
            {after}
        return 0

cli.import_module = lambda name: Module
sys.exit(cli.main(["generate"]))
"""


@pytest.mark.parametrize("times", [1, 10_000])
@pytest.mark.parametrize("options", [(), ("-u",)])
def test_a_reader_that_goes_away_ends_it_in_silence(times: int, options: tuple[str, ...]) -> None:
    code = _WRITES.format(times=times, after="pass")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_an_error() -> None:
    code = _WRITES.format(times=1, after="raise BrokenPipeError('a worker')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BrokenPipeError: a worker" in done.stderr


def test_python_dash_m_is_the_same_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "cantata", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"cantata {__version__}\n"
