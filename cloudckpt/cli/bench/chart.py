"""The figures as a picture.

Law: one panel for wall seconds and one for client CPU seconds of each workload; a name has one place in both.
"""

from typing import Any

from cloudckpt.cli.bench.figures import OPERATIONS, Summary
from cloudckpt.cli.bench.report import summaries_of
from cloudckpt.cli.bench.session import Results
from cloudckpt.cli.bench.workloads import Workload
from cloudckpt.cli.sizes import spelled

_COLORS = {"save": "#c2703d", "load": "#3d6fa8"}
_PANELS = (("wall seconds", "wall_s"), ("client CPU seconds", "cpu_s"))
_INCHES_PER_NAME = 0.42


def draw(results: Results, path: str) -> None:
    """Writes a PNG of bars to ``path``; nothing where no workload was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in results.workloads if results.contenders_of(name)]
    if not names:
        return
    heights = [1.1 + _INCHES_PER_NAME * len(results.contenders_of(name)) for name in names]
    figure = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(names), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, name in zip(rows, names, strict=True):
        _draw_workload(row, results.workloads[name], summaries_of(results, results.workloads[name]))
    rows[0][1].legend(loc="upper right", frameon=False)
    machine = results.machine
    where = f"server {results.server}" if results.server else results.url.split("/cloudckpt-bench-")[0]
    figure.suptitle(f"{where}; {machine.cpu}, {machine.cores} cores; shorter is better", fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)


def _draw_workload(row: Any, workload: Workload, summaries: list[Summary]) -> None:
    contenders = list(dict.fromkeys(summary.contender for summary in summaries))
    rounds = f"median of {workload.rounds} rounds" if workload.rounds > 1 else "one round"
    row[0].set_title(f"{workload.name}: {spelled(workload.nbytes)}, {rounds}", loc="left", fontsize=10)
    for axes, (label, field) in zip(row, _PANELS, strict=True):
        for number, operation in enumerate(OPERATIONS):
            found = {s.contender: getattr(s, field) for s in summaries if s.operation == operation}
            places = [place + (number - 0.5) * 0.38 for place in range(len(contenders))]
            bars = axes.barh(
                places, [found[name] for name in contenders], 0.36, label=operation, color=_COLORS[operation]
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes.set_yticks(range(len(contenders)), contenders)
        for tick in axes.get_yticklabels():
            if tick.get_text().startswith("cloudckpt"):
                tick.set_fontweight("bold")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
