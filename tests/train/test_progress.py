"""What a user sees: in a pipe, on a terminal, and when something goes wrong."""

import io
import logging
import os
import pty
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from cantata.core.logging import console as shared_console
from cantata.core.logging import logging_to
from cantata.train.progress import Console, Summary
from tests.train.samples import record, report

OUT = Path("outputs/aria_mini")


def run(console: Console, start: int = 0) -> None:
    console.on_start(report(OUT), start)
    for step in (start + 1, start + 2):
        console.on_log(record(step))
    console.on_eval(start + 2, {"eval/loss": 3.21, "eval/loss/image": 3.4, "eval/target_tokens": 9})
    console.on_checkpoint(start + 2, OUT / "checkpoints" / "step-00000002")
    console.on_note("a red apple")
    for _ in range(3):
        console.on_warning("source emoji: corrupt image [17]")
    console.on_log(record(start + 3, loss=None))
    console.on_end(Summary("done", 3000, 187, OUT, 2.5, 6.25, 2.125))


def test_plain_lines() -> None:
    stream = io.StringIO()
    run(Console(0, stream))
    lines = stream.getvalue().splitlines()
    first = lines.index("cantata pretrain: aria_mini")
    tail = lines[lines.index("  TensorBoard: tensorboard --logdir outputs/aria_mini/tensorboard") + 1 :]
    assert first == 0
    assert tail[0] == (
        "step    1/3000  loss 5.9000  norm 0.81  lr 3.0e-04  1.93k tok/s/dev  data 2%  eta 3:19:56"
    )
    assert tail[1].startswith("step    2/3000  loss 5.8000")
    assert tail[2:6] == [
        "step 2: held out  loss 3.2100  loss/image 3.4000",
        "step 2: saved outputs/aria_mini/checkpoints/step-00000002",
        "a red apple",
        "warning: source emoji: corrupt image [17]",
    ]
    assert tail[6].startswith("step    3/3000  loss -  norm")
    assert tail[7:] == [
        "done: step 3000 in 3:07, loss 2.5000, held out 6.2500 -> 2.1250, in outputs/aria_mini",
        "warnings: 3",
        "  source emoji: corrupt image [17] (3 times)",
    ]
    assert "\x1b" not in stream.getvalue()


def test_time_left_follows_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 130.0])
    monkeypatch.setattr("cantata.train.progress.time.monotonic", lambda: next(now))
    stream = io.StringIO()
    console = Console(0, stream)
    console.on_start(report(OUT, max_steps=30))
    console.on_log(record(10))
    console.on_log(record(20))
    assert [line.split()[-1] for line in stream.getvalue().splitlines()[-2:]] == ["1:20", "30s"]


def test_other_ranks_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    run(Console(1, stream))
    assert stream.getvalue() == ""
    assert capsys.readouterr().err == "rank 1: warning: source emoji: corrupt image [17]\n"


def test_a_stream_that_cannot_encode_loses_letters_not_the_run() -> None:
    raw = io.BytesIO()
    console = Console(0, io.TextIOWrapper(raw, encoding="ascii"))
    console.on_note("caption: pomme d'été")
    assert raw.getvalue() == b"caption: pomme d'?t?\n"


def test_warnings_of_other_modules_are_repeated_at_the_end_and_all_goes_to_the_log(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logging_to(tmp_path):
        console = Console(0, stream)
        console.on_start(report(OUT))
        logging.getLogger("cantata.data.loader").warning("left out sample %s:%d", "emoji", 7)
        console.on_warning("the disk is nearly full")
        console.on_log(record(1))
        console.on_end(Summary("done", 1, 1, OUT, None, None, None))
        logging.getLogger("cantata.data.loader").warning("after the end")
    assert stream.getvalue().endswith("warnings: 2\n  left out sample emoji:7\n  the disk is nearly full\n")
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "WARNING cantata.progress: the disk is nearly full" in log
    assert "INFO cantata.progress: step    1/3000  loss 5.9000" in log
    assert log.count("left out sample emoji:7") == 1


def test_log_lines_are_not_shown_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("cantata.core.logging.console", RichConsole(file=shown, width=200))
    with logging_to(tmp_path):
        Console(0, io.StringIO()).on_warning("told once")
        logging.getLogger("cantata.data").warning("told by logging")
    assert "told once" not in shown.getvalue()
    assert "told by logging" in shown.getvalue()


PROGRAM = """
import sys
from pathlib import Path
from tests.train.test_progress import OUT, run
from cantata.train.progress import Console
run(Console(0))
Path(sys.argv[1]).write_text("the run went on")
"""


def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "mark")],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])},
        cwd=Path(__file__).parents[2],
    )
    os.close(writer)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == b""
    assert (tmp_path / "mark").read_text() == "the run went on"


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_one_live_line(colour: bool) -> None:
    text = on_terminal(COLUMNS="120", **({} if colour else {"NO_COLOR": "1"}))
    assert "\x1b[2K" in text
    assert ("\x1b[36m" in text) == colour
    for part in (
        "   1/3000",
        "step 2: held out",
        "a red apple",
        "corrupt image [17] (3 times)",
        "done: step 3000",
    ):
        assert part in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_narrow_terminal_keeps_the_live_line_in_one_line() -> None:
    text = on_terminal(COLUMNS="80", NO_COLOR="1")
    live = [line for line in text.replace("\r", "\n").splitlines() if "1/3000" in line]
    assert live
    assert all("eta" in line for line in live)


def test_a_dumb_terminal_gets_plain_lines() -> None:
    text = on_terminal(TERM="dumb")
    assert "\x1b" not in text
    assert "step    1/3000  loss 5.9000" in text


def on_terminal(**variables: str) -> str:
    """What a fork of this process writes there; a new one would import for seconds."""
    process, master = pty.fork()
    if process == 0:
        try:
            os.environ.update({"TERM": "xterm", **variables})
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            # The shared console, as a new process would make it.
            shared_console.__init__(stderr=True)  # type: ignore[misc]
            run(Console(0))
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        text += part
    os.close(master)
    assert os.waitpid(process, 0)[1] == 0, text.decode()
    return text.decode()
