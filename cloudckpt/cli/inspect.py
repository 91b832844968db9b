"""``cloudckpt inspect``: what is in a checkpoint, and what its tensors are like.

Law: parses and shows; the catalog decides.
"""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from cloudckpt.cli.output import show_json, show_size
from cloudckpt.cli.place import Url
from cloudckpt.cli.tables import Column, is_narrow, show_table

if TYPE_CHECKING:
    from cloudckpt.catalog import Inspection, Leaf, Module, TensorDetails

_COLUMNS = (
    Column("name"),
    Column("what"),
    Column("parameters", is_number=True),
    Column("size", is_number=True),
    Column("chunks", is_number=True),
    Column("shards", is_number=True),
)
_NARROW = (0, 1, 3)
"""Those that a narrow terminal has room for."""

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*#@"
"""For a stdout that knows ASCII only."""


@click.command()
@click.argument("url", type=Url())
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--depth", type=click.IntRange(min=0), default=3, show_default=True, help="Modules in modules to show.")
@click.option("--tensor", "keys", multiple=True, metavar="KEY", help="Tell the numbers of this tensor; repeatable.")
@click.option("--json", "is_json", is_flag=True, help="Print all of it as JSON, at any depth.")
def command(*, url: str, patterns: tuple[str, ...], depth: int, keys: tuple[str, ...], is_json: bool) -> None:
    """Shows the modules and tensors of the checkpoint at URL, of any format; of keys that match a PATTERN, or all.

    With --tensor, reads that tensor and shows its numbers and a histogram in place of the tree.
    """
    from cloudckpt.catalog import inspect
    from cloudckpt.progress import shown

    with shown("reading", progress=bool(keys) and sys.stderr.isatty()) as report:
        found = inspect(url, patterns or "*", tensors=keys, report=report)
    if is_json:
        show_json(found)
    elif keys:
        for i, tensor in enumerate(found.tensors):
            if i:
                click.echo()
            show_table([Column("tensor"), Column(tensor.key)], _of_tensor(tensor))
    else:
        _show(found, depth)


def _show(found: "Inspection", depth: int) -> None:
    from cloudckpt.catalog import joined

    show_table([Column("checkpoint"), Column(found.url)], _of_whole(found))
    if found.tree.entry_count:
        click.echo()
    rows = [row for row in _of_module(joined(found.tree), depth) if row]
    shown = _NARROW if is_narrow() else range(len(_COLUMNS))
    show_table([_COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _of_whole(found: "Inspection") -> Iterator[list[str]]:
    tree = found.tree
    stored = "" if found.stored_nbytes is None else f", {show_size(found.stored_nbytes)} stored"
    yield ["format", found.format]
    if found.step is not None:
        yield ["step", str(found.step)]
    if found.created is not None:
        yield ["created", f"{found.created:%Y-%m-%d %H:%M:%S%z} by {found.writer}"]
    yield ["size", f"{show_size(tree.nbytes)} in {_count(tree.object_count, 'object')}{stored}"]
    yield ["entries", f"{tree.entry_count:,}"]
    yield ["tensors", f"{tree.tensor_count:,} of {tree.parameter_count:,} elements"]
    yield ["dtypes", ", ".join(f"{dtype} {show_size(nbytes)}" for dtype, nbytes in tree.dtypes.items())]
    for chain in found.chains:
        how = " then ".join(chain.extensions) or "plain"
        yield ["stored", f"{how}: {_count(chain.shard_count, 'shard')}"]
    if found.metrics:
        yield ["metrics", " ".join(f"{name}={value:g}" for name, value in found.metrics.items())]
    if found.metadata is None:
        yield ["metadata", "encrypted"]
    elif found.metadata:
        yield ["metadata", json.dumps(found.metadata)]


def _of_module(module: "Module", depth: int, level: int = 0) -> Iterator[list[str]]:
    """Rows of what is in a module: names set in on a terminal, and whole keys elsewhere."""
    if level == depth:
        return
    is_terminal = sys.stdout.isatty()
    for child in module.children:
        name = f"{'  ' * level}{child.name}." if is_terminal else f"{child.path}."
        yield [name, ", ".join(child.dtypes), *_sizes(child), str(child.object_count)]
        yield from _of_module(child, depth, level + 1)
    for leaf in module.leaves:
        name = f"{'  ' * level}{leaf.name}" if is_terminal else leaf.key
        what = f"{leaf.dtype} {list(leaf.shape or ())}" if leaf.kind == "tensor" else leaf.kind
        yield [name, what, *_sizes(leaf), str(len(leaf.objects))]


def _sizes(part: "Module | Leaf") -> list[str]:
    return [f"{part.parameter_count:,}", show_size(part.nbytes), str(part.chunk_count)]


def _of_tensor(tensor: "TensorDetails") -> Iterator[list[str]]:
    yield ["dtype", f"{tensor.dtype}, of which the magnitudes follow" if tensor.is_magnitude else tensor.dtype]
    yield ["shape", str(list(tensor.shape))]
    yield ["elements", f"{tensor.count:,}"]
    for name in ("minimum", "maximum", "mean", "std"):
        number = getattr(tensor, name)
        yield [name, "" if number is None else f"{number:.6g}" if isinstance(number, float) else str(number)]
    yield ["nan", f"{tensor.nan_count:,}"]
    yield ["infinite", f"{tensor.inf_count:,}"]
    yield ["zero", f"{tensor.zero_count:,}"]
    if tensor.bin_counts:
        first, last = tensor.bin_edges[0], tensor.bin_edges[-1]
        yield ["histogram", _bars(tensor.bin_counts)]
        yield ["", f"from {first:.4g} to {last:.4g}, at most {max(tensor.bin_counts):,} in one of these bins"]


def _bars(counts: tuple[int, ...]) -> str:
    """A bar for each bin; one that is not empty is never as low as one that is."""
    bars = _BARS if _can_show(_BARS) else _PLAIN_BARS
    most = max(counts)
    return "".join(bars[-(-count * (len(bars) - 1) // most)] for count in counts)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n:,} {what}s"


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
