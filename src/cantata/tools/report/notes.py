"""What a reader must know of the data behind the page, so that nothing is left out in silence."""

from __future__ import annotations

from cantata.tools.report.experts import FRAMES
from cantata.tools.report.lines import LAYER_BUCKETS
from cantata.tools.report.run import METRICS, Run
from cantata.tools.report.samples import EVALUATIONS, SAMPLES, SHEETS
from cantata.tools.report.series import BUCKETS


def notes(run: Run) -> list[str]:
    """A line each; none of a run whose page shows all that there is."""
    metrics, samples = run.metrics, run.samples
    told = []
    if not metrics.lines:
        told.append(f"{METRICS} holds no step yet")
    if metrics.broken:
        cut = ", the last one cut short" if metrics.is_cut else ""
        told.append(f"{METRICS}: {_lines(metrics.broken)} broken and left out{cut}")
    for restart in metrics.restarts:
        told.append(
            f"step {restart.step:,} and what follows were logged again after a resume: "
            f"{_lines(restart.dropped)} of before replaced"
        )
    if metrics.not_numbers:
        told.append(f"{METRICS}: {metrics.not_numbers:,} values are no numbers and left out")
    for name, count in metrics.without_value().items():
        told.append(f"{name}: no finite value {count:,} times, gaps in its chart")
    if metrics.never_known():
        told.append(f"never known: {', '.join(metrics.never_known())}")
    if metrics.lines > 2 * BUCKETS:
        told.append(
            f"{metrics.lines:,} lines are thinned: charts show the lowest and the highest value of each of "
            f"{BUCKETS} intervals, of layers {LAYER_BUCKETS}"
        )
    if run.experts.problem:
        told.append(run.experts.problem)
    if run.experts.intervals > FRAMES:
        told.append(f"expert load: {FRAMES} of {run.experts.intervals:,} intervals are shown")
    if samples.samples > SAMPLES or samples.evaluations > EVALUATIONS:
        told.append(
            f"samples: {min(samples.samples, SAMPLES)} of {samples.samples:,} are shown, of "
            f"{min(samples.evaluations, EVALUATIONS)} of {samples.evaluations:,} evaluations"
        )
    if samples.pictures > SHEETS:
        told.append(f"pictures: {SHEETS} of {samples.pictures:,} are shown")
    return told + samples.problems


def _lines(count: int) -> str:
    return f"{count:,} line{'s' if count > 1 else ''}"
