"""Whether rectangles make up a tensor: each element once.

Law: pure, and exact: nothing is sampled, and no element is looked at.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cloudckpt.manifest.structs import Chunk

MAX_CUT_AXES = 8
"""Axes along which a tensor may be cut: each doubles what has to be looked at, and there are no meshes of more."""

_SPARE_TERMS = 1 << 18
"""Corners held beside four for each chunk. A grid's cancel at once, whatever its axes; made up ones need not."""

_Terms = Mapping[tuple[Any, ...], int]
"""How often what lies between two corners, or at a corner, along each axis, is counted."""


def tiling_problem(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> str | None:
    """What keeps the chunks from holding each element of their tensor exactly once; None if nothing does.

    How often each element is held, less the once that it should be, is a function of steps. Its difference along one
    axis after the other is not zero at corners of rectangles alone, and is zero everywhere exactly when the function
    is. So the corners of all chunks have to cancel those of the tensor.

    Args:
        shape: of the tensor.
        chunks: each of which lies in it. Those without elements hold nothing.
    """
    if 0 in shape or (len(chunks) == 1 and chunks[0].sizes == shape):
        return None
    filled = [chunk for chunk in chunks if 0 not in chunk.sizes]
    cut = [
        axis
        for axis, sizes in enumerate(zip(*(chunk.sizes for chunk in filled), strict=True))
        if set(sizes) != {shape[axis]}
    ]
    if len(cut) > MAX_CUT_AXES:
        return (
            f"its chunks cut it along {len(cut)} axes; this release reads tensors that are cut along {MAX_CUT_AXES}"
        )
    terms: _Terms = Counter(
        tuple([(chunk.offsets[a], chunk.offsets[a] + chunk.sizes[a]) for a in cut]) for chunk in filled
    )
    whole = tuple((0, shape[a]) for a in cut)
    terms = {**terms, whole: terms.get(whole, 0) - 1}
    for _ in cut:
        terms = _differences(terms)
        if len(terms) > _SPARE_TERMS + 4 * len(filled):
            return "its chunks meet in too many corners to tell whether they cover it"
    terms = {corner: count for corner, count in terms.items() if count}
    if not terms:
        return None
    first = min(terms)  # nothing before it differs from once, so that it does by just that much
    corner = dict(zip(cut, first, strict=True))
    return _told(tuple(corner.get(axis, 0) for axis in range(len(shape))), chunks)


def _differences(terms: _Terms) -> _Terms:
    """The difference along the axis that stands first in the keys; its corner stands last in those returned."""
    found: dict[tuple[Any, ...], int] = {}
    for key, count in terms.items():
        start, stop = key[0]
        rest = key[1:]
        for corner, change in (((*rest, start), count), ((*rest, stop), -count)):
            total = found.get(corner, 0) + change
            if total:
                found[corner] = total
            else:
                found.pop(corner, None)
    return found


def _told(element: tuple[int, ...], chunks: Sequence[Chunk]) -> str:
    holding = [
        i
        for i, chunk in enumerate(chunks)
        if all(o <= e < o + s for o, e, s in zip(chunk.offsets, element, chunk.sizes, strict=True))
    ]
    if not holding:
        return f"no chunk holds its element at {element}"
    a, b = holding[:2]
    if (chunks[a].offsets, chunks[a].sizes) == (chunks[b].offsets, chunks[b].sizes):
        return f"chunks[{a}] and chunks[{b}] are the same rectangle, at {chunks[a].offsets}"
    return f"chunks[{a}] and chunks[{b}] overlap: both hold its element at {element}"
