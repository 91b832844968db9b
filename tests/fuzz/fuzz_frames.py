"""Stored frames and streams that lie: they are restored to the bytes that there should be, or refused."""

import io
import random
from functools import cache

from cloudckpt.convert.stock_dcp import TransformedBytes
from cloudckpt.convert.stock_dcp import _undo as undoing
from cloudckpt.errors import CheckpointError
from cloudckpt.extensions import AesGcm, BytePlane, ExtensionRegistry, ZStandard
from cloudckpt.extensions.base import FrameContext
from cloudckpt.extensions.chain import Chain, open_shard
from cloudckpt.extensions.scratch import Scratch
from cloudckpt.ranges import Range
from cloudckpt.testing import Rot13
from fuzz.reading import KEYS

FRAME_NBYTES = 600
LIMIT = 1 << 16
PLAIN = random.Random(5).randbytes(100) + bytes(range(100)) * 5
"""Some of it compresses."""


@cache
def chains():
    """Chains of all kinds: extensions, and the frame that each stores PLAIN as."""
    made = []
    for extensions in (
        (ZStandard(),),
        (BytePlane(width=4),),
        (BytePlane(width=2), ZStandard()),
        (AesGcm("k", KEYS),),
        (BytePlane(width=8), ZStandard(), AesGcm("k", KEYS)),
        (Rot13(),),
        (Rot13(), ZStandard()),
        (ZStandard(), Rot13()),
    ):
        shard = Chain(extensions).start_shard()
        stored = b"".join(shard.transform(memoryview(PLAIN), context()))
        made.append((extensions, shard.descriptors, shard.params, stored))
    return made


@cache
def streams():
    """The same as torch's writer stores them."""
    made = []
    for extensions, descriptors, _, _ in chains():
        data = PLAIN
        for extension in extensions:
            data = streamed(extension, data)
        made.append((descriptors, data))
    return made


class Kept(io.BytesIO):
    """Keeps what was written when it is closed."""

    def close(self):
        self.kept = self.getvalue()
        super().close()


def streamed(extension, data):
    """What an extension stores ``data`` as, as a stream."""
    output = Kept()
    stream = extension.transform_to(output)
    stream.write(data)
    stream.close()
    return output.kept if output.closed else output.getvalue()


def context(width=4):
    """Of the only frame of an item."""
    return FrameContext(shard="0" * 32, item="t", number=3, index=0, is_last=True, width=width)


def seeds():
    """Valid inputs: the number of a chain, and what it stores."""
    frames = [bytes([i]) + stored for i, (*_, stored) in enumerate(chains())]
    return frames + [bytes([128 + i]) + data for i, (_, data) in enumerate(streams())]


@cache
def registry():
    """Knows all of them."""
    made = ExtensionRegistry()
    made.register(Rot13)
    return made.with_keys(KEYS)


def check(data):
    """Restores what follows the first byte, which says how."""
    if not data:
        return
    kind, stored = data[0], memoryview(data)[1:]
    if kind < 128:
        check_frame(kind % len(chains()), stored)
    else:
        check_stream(kind % len(streams()), stored)


def check_frame(kind, stored):
    """Restores a frame by the chain of that number."""
    _, descriptors, params, sound = chains()[kind]
    for nbytes in (len(PLAIN), 1, len(stored)):
        scratch = Scratch()
        shard = open_shard(registry().from_descriptor_list(descriptors), descriptors, params, scratch)
        try:
            plain = shard.restore(stored, context(), nbytes)
        except CheckpointError:
            assert (stored, nbytes) != (sound, len(PLAIN))
            continue
        assert len(plain) == nbytes
        if (stored, nbytes) == (sound, len(PLAIN)):
            assert plain == PLAIN
        held = sum(map(len, scratch._of_thread.__dict__.get("held", ())))
        assert held <= 2 * shard.max_stored_size(nbytes) + 4 * nbytes, (held, nbytes)


def check_stream(kind, stored):
    """Restores a stream by the chain of that number."""
    descriptors, sound = streams()[kind]
    undo = undoing(descriptors, registry())
    item = TransformedBytes(key="x", extent=Range(0, len(stored)), undo=undo, limit=LIMIT)
    try:
        plain = item.decode(stored)
    except CheckpointError:
        assert stored != sound
        return
    assert len(plain) <= LIMIT
    if stored == sound:
        assert plain == PLAIN
