"""The way up, planned: items into shards, shards into parts, parts into segments of frames.

Law: pure. Nothing here has seen a byte of data.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import msgspec

from cloudckpt import safetensors_header
from cloudckpt.errors import UsageError
from cloudckpt.extensions.base import FrameContext
from cloudckpt.extensions.chain import Chain
from cloudckpt.layout import token_of
from cloudckpt.ranges import Range, balanced_size, split
from cloudckpt.safetensors_header import HeaderItem

MIN_PART_SIZE = 5 << 20
MAX_PART_SIZE = 5 << 30
MAX_PARTS = 10_000
MAX_SHARD_SIZE = 5 << 40
"""S3's limits: docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""

LEAST_PART_SIZE = 8 << 20
"""Objects are cut in parts that are no smaller (unless asked for): each costs a millisecond of CPU."""

_MIB = 1 << 20
_PART_UNIT = 64 << 10
FRAME_ALIGNMENT = 16
"""Bytes of the widest element: frames of a shard with extensions begin at multiples of it."""

MAX_FRAME_SIZE = 1 << 30
"""Of plain bytes; readers take that much memory for a frame."""

HEADER = -1
"""In place of an item's index: the shard's header, which no frame covers."""


class Item(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a shard is told of an item.

    Attributes:
        header: its name, dtype and shape as the shard's header has them, and its size.
        notes: what a rebuild needs beside these; plain JSON, empty where nothing is.
        width: bytes per element, where the header does not tell: raw bytes that stand for wider elements.
        number_size: bytes of each number in it (see `dtypes.Dtype.number_size`); 1 for bytes.
    """

    header: HeaderItem
    notes: dict[str, object]
    width: int = 1
    number_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Where everything in a shard will lie.

    Attributes:
        key: of the object.
        header: its first bytes.
        items: indices into the planned items, in the order they lie.
        starts: the first byte of each, and at last the object's size.
        frames: the first frame of each, and at last their count.
    """

    key: str
    header: bytes
    items: tuple[int, ...]
    starts: tuple[int, ...]
    frames: tuple[int, ...]
    frame_size: int

    @property
    def size(self) -> int:
        """Bytes of the object."""
        return self.starts[-1]


class Segment(msgspec.Struct, frozen=True, gc=False):
    """Bytes of one item (or of the header) that lie in one part and in one frame.

    Attributes:
        item: index into the planned items, or `HEADER`.
        at: within the item.
        frame: among the shard's, or `HEADER`.
    """

    item: int
    at: Range
    frame: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesPlan:
    """What a shard of transformed frames will hold; where it lies there shows as it is written.

    Attributes:
        key: of the object.
        chain: the extensions its frames go through.
        items: indices into the planned items, in the order they lie.
        frames: the first frame of each, and at last their count.
        frame_size: plain bytes of a frame; no element lies in two.
    """

    key: str
    chain: Chain
    items: tuple[int, ...]
    frames: tuple[int, ...]
    frame_size: int


@dataclass(frozen=True, slots=True)
class PlannedFrame:
    """A frame before it is transformed: ``at`` is counted from the item's first byte."""

    item: int
    at: Range
    context: FrameContext


AnyPlan = ShardPlan | FramesPlan


def plan_shards(
    items: Sequence[Item],
    chosen: Sequence[int] | None = None,
    *,
    rank: int,
    frame_size: int,
    new_token: Callable[[], str],
    key_of: Callable[[str], str],
    max_size: int = MAX_SHARD_SIZE,
    max_header_nbytes: int = safetensors_header.MAX_NBYTES,
) -> list[ShardPlan]:
    """Lays items out in as few shards as their limits allow.

    Items with wider elements come first, so that each begins at a multiple of its element's width, or of the
    header's 8 where that is less.

    Args:
        items: any number; none makes no shard.
        chosen: indices of those that go in; all if not given.
        rank: the writer's, noted in the header.
        frame_size: plain bytes per frame.
        new_token: makes a random token for each shard.
        key_of: spells the shard's key from its token.
        max_size: bytes a shard may have.
        max_header_nbytes: bytes a shard's header may have.
    """
    indices = range(len(items)) if chosen is None else chosen
    order = sorted(indices, key=lambda i: -max(items[i].width, _width(items[i].header)))

    def plan(group: list[int]) -> ShardPlan:
        token = new_token()
        return _plan_shard(items, group, rank=rank, frame_size=frame_size, token=token, key_of=key_of)

    plans: list[ShardPlan] = []
    group: list[int] = []
    header_nbytes, data_nbytes = 1024, 0
    for i in order:
        cost = _header_cost(items[i])
        nbytes = items[i].header.nbytes
        if group and (header_nbytes + cost > max_header_nbytes or header_nbytes + data_nbytes + nbytes > max_size):
            plans.append(plan(group))
            group, header_nbytes, data_nbytes = [], 1024, 0
        group.append(i)
        header_nbytes += cost
        data_nbytes += nbytes
    if group:
        plans.append(plan(group))
    return plans


def plan_frames(
    items: Sequence[Item],
    chosen: Sequence[int],
    chain: Chain,
    *,
    frame_size: int,
    new_key: Callable[[], str],
    max_size: int,
) -> list[FramesPlan]:
    """Lays items out in shards whose frames go through ``chain``, in their order.

    Args:
        items: all of the rank.
        chosen: indices of those that go through this chain.
        chain: at least one extension.
        frame_size: plain bytes of a frame; rounded up so that no element lies in two.
        new_key: spells a key for each shard.
        max_size: plain bytes a shard may have.

    Raises:
        UsageError: an item has more than that.
    """
    frame_size = -(-frame_size // FRAME_ALIGNMENT) * FRAME_ALIGNMENT
    groups: list[list[int]] = []
    room = 0
    for i in chosen:
        nbytes = items[i].header.nbytes
        if nbytes > max_size:
            msg = (
                f"{items[i].header.name!r} has {nbytes} bytes, and an item with extensions at most {max_size}: "
                "split it, or save it without them"
            )
            raise UsageError(msg)
        if not groups or nbytes > room:
            groups.append([])
            room = max_size
        groups[-1].append(i)
        room -= nbytes
    return [
        FramesPlan(
            key=new_key(),
            chain=chain,
            items=tuple(group),
            frames=tuple(accumulate((-(-items[i].header.nbytes // frame_size) for i in group), initial=0)),
            frame_size=frame_size,
        )
        for group in groups
    ]


def planned_frames(plan: FramesPlan, items: Sequence[Item]) -> Iterator[PlannedFrame]:
    """Every frame of the shard, in the order in which they lie."""
    token = token_of(plan.key)
    for i, first, stop in zip(plan.items, plan.frames, plan.frames[1:], strict=False):
        item = items[i]
        for index, at in enumerate(split(Range(0, item.header.nbytes), plan.frame_size)):
            context = FrameContext(
                shard=token,
                item=item.header.name,
                number=first + index,
                index=index,
                is_last=first + index + 1 == stop,
                width=item.number_size,
            )
            yield PlannedFrame(i, at, context)


def _plan_shard(
    items: Sequence[Item],
    group: list[int],
    *,
    rank: int,
    frame_size: int,
    token: str,
    key_of: Callable[[str], str],
) -> ShardPlan:
    notes = {items[i].header.name: items[i].notes for i in group if items[i].notes}
    about = {"version": 1, "rank": rank, "attempt": token, "items": notes}
    metadata = {"format": "pt", "cloudckpt": msgspec.json.encode(about).decode()}
    header = safetensors_header.encode([items[i].header for i in group], metadata)
    sizes = [items[i].header.nbytes for i in group]
    return ShardPlan(
        key=key_of(token),
        header=header,
        items=tuple(group),
        starts=tuple(accumulate(sizes, initial=len(header))),
        frames=tuple(accumulate((-(-n // frame_size) for n in sizes), initial=0)),
        frame_size=frame_size,
    )


def _width(header: HeaderItem) -> int:
    numel = prod(header.shape)
    return header.nbytes // numel if numel else 0


def _header_cost(item: Item) -> int:
    """An upper bound: JSON may spell a byte as an escape of six, and notes are quoted once more."""
    name = len(item.header.name.encode())
    notes = name * 7 + len(msgspec.json.encode(item.notes)) * 2 if item.notes else 0
    return name * 6 + len(item.header.shape) * 21 + safetensors_header.PER_ITEM_NBYTES + notes


def part_size_for(size: int, *, most: int, ways: int) -> int:
    """The size of all parts but the last of an object of ``size`` bytes: even ones, within what S3 allows."""
    even = balanced_size(size, most=most, ways=ways, least=LEAST_PART_SIZE, unit=_PART_UNIT)
    return min(MAX_PART_SIZE, max(even, MIN_PART_SIZE, -(-size // (MAX_PARTS * _MIB)) * _MIB))


def segments(plan: ShardPlan, part: Range) -> Iterator[Segment]:
    """Cuts a part of the shard at the borders of items and frames; yields its bytes in order."""
    if part.start < len(plan.header):
        yield Segment(HEADER, Range(part.start, min(part.stop, len(plan.header))), HEADER)
    n = max(0, bisect_right(plan.starts, part.start) - 1)
    while n < len(plan.items) and plan.starts[n] < part.stop:
        whole = Range(plan.starts[n], plan.starts[n + 1])
        at = whole.intersect(part).shift(-whole.start)
        start = at.start
        while start < at.stop:
            frame = start // plan.frame_size
            stop = min(at.stop, (frame + 1) * plan.frame_size)
            yield Segment(plan.items[n], Range(start, stop), plan.frames[n] + frame)
            start = stop
        n += 1
