"""Runs as one page: what templates need, and the one script that may run there."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from cantata import __version__
from cantata.tools import html
from cantata.tools.report.charts import charts_of
from cantata.tools.report.configs import differences
from cantata.tools.report.experts import CELL
from cantata.tools.report.lines import COLOURS, HEIGHT, WIDTH
from cantata.tools.report.notes import notes
from cantata.tools.report.run import Run
from cantata.tools.report.state import shown_time
from cantata.tools.report.summary import facts
from cantata.train.expert_maps import STOPS

HERE = Path(__file__).parent


def page(runs: Sequence[Run]) -> str:
    """The page; every text of a run is escaped, and only this page's script is allowed by its hash."""
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment = html.environment(HERE)
    environment.filters["visible"] = html.visible
    environment.filters["slug"] = lambda title: "".join(c if c.isalnum() else "-" for c in title.lower())
    environment.filters["shown_time"] = shown_time
    last = max([1, *(run.metrics.last_step for run in runs)])
    figures = {run.label: facts(run) for run in runs}
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        facts=figures,
        columns=list(dict.fromkeys(fact.name for one in figures.values() for fact in one)),
        noted=[(run.label, note) for run in runs for note in notes(run)],
        groups=charts_of({run.label: run.metrics for run in runs}),
        differences=differences([run.config for run in runs]),
        resumes=[(step / last * WIDTH, run.label, step) for run in runs for step in run.resumes],
        last=last,
        size=(WIDTH, HEIGHT),
        colours=COLOURS,
        cell=CELL,
        stops=[f"rgb{stop}" for stop in STOPS],
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        script=Markup(script),
        scripts=f"'sha256-{digest}'",
    )
