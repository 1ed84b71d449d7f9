"""`cantata report RUN [RUN ...]`: runs as one page that needs no network, alone or side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cantata.core.errors import ConfigError
from cantata.tools.arguments import Parser
from cantata.tools.report.page import page
from cantata.tools.report.run import Run, read_runs
from cantata.train import humane

FILE = "report.html"


def write_report(paths: Sequence[Path], to: Path | None = None) -> tuple[list[Run], Path]:
    """Write the page and return what it tells of and where it is.

    Args:
        paths: run directories, at least one.
        to: the file; None: `report.html` in the one run's directory, or, of several, in the current one.

    Raises `ConfigError` where a path is no run directory or the page cannot be written.
    """
    runs = read_runs(paths)
    file = to or (paths[0] / FILE if len(paths) == 1 else Path(FILE))
    text = page(runs)
    unfinished = file.with_name(file.name + ".incomplete")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: the page cannot be written: {error.strerror or error}") from error
    return runs, file


def main(arguments: Sequence[str]) -> int:
    """The command; raises `ConfigError` for what is no run."""
    parser = Parser(prog="cantata report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help=f"the page (default: RUN/{FILE}; of several runs {FILE})"
    )
    given = parser.parse_args(list(arguments))
    runs, file = write_report(given.runs, given.to)
    for run in runs:
        print(f"{run.label}: {run.state.word}, step {run.metrics.last_step:,}")
    print(f"report: {file} ({humane.size(file.stat().st_size)})")
    return 0
