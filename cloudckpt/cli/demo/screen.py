"""How the demo looks to a person.

Law: talk to stderr, findings to stdout. Bars move on a terminal only; elsewhere lines stay few.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Screen:
    """The demo's two voices."""

    def __init__(self) -> None:
        """Talks to this process's stderr and stdout."""
        self._talk = Console(stderr=True, highlight=False, soft_wrap=True)
        self._data = Console(highlight=False, soft_wrap=True)

    def head(self, text: str) -> None:
        """Begins a chapter."""
        self._talk.print(f"\n[bold]{text}[/bold]")

    def say(self, text: str) -> None:
        """Says a line; rich's markup is understood."""
        self._talk.print(f"  {text}")

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[[int, str], None]]:
        """A bar over training steps: the callable takes the steps done and a remark."""
        columns = (
            TextColumn("  step {task.completed:>2}/{task.total}"),
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._talk, transient=True, disable=not self._talk.is_terminal) as bar:
            task = bar.add_task("starting two ranks", total=total)
            yield lambda done, remark: bar.update(task, completed=done, description=remark)

    def curves(self, before: Mapping[int, str], dead: Mapping[int, str], resumed: Mapping[int, str]) -> None:
        """The losses of the runs side by side, every bit of them."""
        table = Table(box=box.SIMPLE, pad_edge=False)
        for name in ("step", "undisturbed", "killed", "resumed", ""):
            table.add_column(name, justify="right" if name == "step" else "left", no_wrap=True)
        for step, bits in before.items():
            others = {run[step] for run in (dead, resumed) if step in run}
            verdict = "[green]same bits[/green]" if others == {bits} else "[bold red]differs[/bold red]"
            cells = [_trimmed(run[step]) if step in run else "" for run in (before, dead, resumed)]
            table.add_row(str(step), *cells, verdict + (", then killed" if step == max(dead) else ""))
        self._talk.print(table)

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """The small table at the end."""
        table = Table(box=box.ROUNDED, show_header=False)
        for row in rows:
            table.add_row(*row)
        self._data.print(table)

    def json(self, text: str) -> None:
        """The findings for a program to read."""
        self._data.print(text, markup=False)


def _trimmed(bits: str) -> str:
    """As `float.hex` spells it, less the zeros at its end: they are where a float64 is longer than a float32."""
    mantissa, _, exponent = bits.partition("p")
    return f"{mantissa.rstrip('0')}p{exponent}"
