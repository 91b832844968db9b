"""A checkpoint damaged in every way that storage can, one at a time: what is read of it is right, or it is an error.

Everything is counted and printed (``pytest -s``). ``DAMAGE=10`` samples ten times as much, ``DAMAGE_SEED`` elsewhere.
"""

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import prod

import pytest
import torch
import torch.distributed.checkpoint as dcp
from msgspec.structs import replace
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt import catalog
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.read import ReadOptions
from cloudckpt.errors import IntegrityError, ManifestError, StoreError
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.layout import MANIFEST
from cloudckpt.manifest import TensorEntry, encode, parse, unpack
from cloudckpt.ranges import Range

SCALE = int(os.environ.get("DAMAGE", "1"))
SEED = int(os.environ.get("DAMAGE_SEED", "0"))
KEYS = {"k": bytes(range(32))}
READING = {"keys": KEYS, "max_gap": 0}
FRAME = 4096
NOTHING = -7.0
"""What destinations are filled with; no tensor that is saved has it."""

CHAINS = {
    "plain": {"*": []},
    "planes, zstd": {"a.*": [BytePlane(), ZStandard()], "b.*": [ZStandard()]},
    "aesgcm": {"a.*": [AesGcm("k", KEYS)], "b.*": [BytePlane(), AesGcm("k", KEYS)]},
}
"""Each of two shards; those of the first and the last are of one size."""

DETECTORS = ("a strict load of a slice", "a default load", 'a load with verify="before"', "verify(deep=True)")
SLICE, DEFAULT, BEFORE, DEEP = DETECTORS
LOADS = {SLICE, DEFAULT, BEFORE}


def half(name, seed):
    """As many bytes whatever the seed; each tensor in several frames, the last of them shorter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.w": torch.randint(0, 50, (90, 33), generator=generator).float(),
        f"{name}.m": torch.randn(77, 50, generator=generator).bfloat16(),
        f"{name}.x": random.Random(seed).randbytes(2500).hex(),
    }


@dataclass(frozen=True, slots=True)
class Place:
    """A frame: where it lies, and what of which entry it holds."""

    shard: str
    at: Range
    key: str
    plain: Range


@dataclass(frozen=True, slots=True)
class Injection:
    """One damage.

    Attributes:
        kind: for the table.
        change: the objects that it puts in place of others; None where it takes one away.
        found_by: the detectors that must find it. The others read nothing of it.
        place: the frame that is damaged, if it is one.
    """

    kind: str
    change: Callable[[], dict[str, bytes | None]]
    found_by: frozenset[str] = frozenset(DETECTORS)
    place: Place | None = None


class Saved:
    """A checkpoint of two shards on a server, and the same shards of an older one that was of the same shape."""

    def __init__(self, chain, root, store, client):
        self.url, self._store, self._client = f"{root}/ckpt", store, client
        self.state = half("a", 1) | half("b", 2)
        if chain["*" if "*" in chain else "a.*"]:
            self.objects = self._save("ckpt", self.state, root, chain)
            older = self._save("older", half("a", 3) | half("b", 4), root, chain)
        else:  # as two ranks would
            self.objects = self._joined("ckpt", root, chain, 1)
            older = self._joined("older", root, chain, 3)
        for name, data in self.objects.items():
            self._put({name: data})
        self.manifest = parse(self.objects[MANIFEST], self.url)
        self.shards = [shard.key for shard in self.manifest.shards]
        before = [shard.key for shard in parse(older[MANIFEST], self.url).shards]
        self.older = {now: older[then] for now, then in zip(self.shards, before, strict=True)}
        self.places = list(self._places())

    def _save(self, name, state, root, chain):
        writer = ObjectStoreWriter(f"{root}/{name}", store=self._store, extensions=chain, frame_size=FRAME)
        dcp.save(state, storage_writer=writer, no_dist=True)
        prefix = f"{root}/{name}/".removeprefix("s3://checkpoints/")
        listing = self._client.list_objects_v2(Bucket="checkpoints", Prefix=prefix)["Contents"]
        read = {o["Key"]: self._client.get_object(Bucket="checkpoints", Key=o["Key"])["Body"].read() for o in listing}
        return {key.removeprefix(prefix): data for key, data in read.items()}

    def _joined(self, name, root, chain, seed):
        halves = [self._save(f"{name}-{n}", half(n, seed + i), root, chain) for i, n in enumerate("ab")]
        first, second = (parse(objects[MANIFEST], name) for objects in halves)
        moved = {
            key: replace(entry, chunks=tuple(replace(chunk, shard=1) for chunk in entry.chunks))
            if isinstance(entry, TensorEntry)
            else replace(entry, shard=1)
            for key, entry in second.entries.items()
        }
        manifest = replace(first, shards=first.shards + second.shards, entries=first.entries | moved)
        return halves[0] | halves[1] | {MANIFEST: encode(manifest)}

    def _places(self):
        for key, entry in self.manifest.entries.items():
            (at,) = entry.chunks if isinstance(entry, TensorEntry) else (entry,)
            shard = self.manifest.shards[at.shard]
            is_tensor = isinstance(entry, TensorEntry)
            nbytes = prod(entry.shape) * DTYPES[entry.dtype].itemsize if is_tensor else entry.nbytes
            plain = [Range(i, min(i + FRAME, nbytes)) for i in range(0, nbytes, FRAME)]
            stored = [frame.shift(at.start) for frame in plain]
            if shard.extensions:
                ends = list(pairwise(accumulate(unpack(shard.frame_sizes), initial=0)))
                stored = [Range(*ends[at.frame + i]) for i in range(len(plain))]
            yield from (Place(shard.key, *both[:1], key, both[1]) for both in zip(stored, plain, strict=True))

    def _put(self, objects):
        prefix = self.url.removeprefix("s3://checkpoints/")
        for name, data in objects.items():
            if data is None:
                self._client.delete_object(Bucket="checkpoints", Key=f"{prefix}/{name}")
            else:
                self._client.put_object(Bucket="checkpoints", Key=f"{prefix}/{name}", Body=bytes(data))

    def damage(self, change):
        self._put(change)

    def heal(self, change):
        self._put({name: self.objects[name] for name in change})

    def detected(self, detector, place):
        """Whether it raises, as it should for damage. If it does not, what it read is proven right."""
        try:
            if detector == DEEP:
                return not catalog.verify(
                    self.url, deep=True, options=ReadOptions(keys=KEYS), store=self._store
                ).is_sound
            if detector == SLICE:
                self._read_slices([place] if place else self.places)
            else:
                self._load("before" if detector == BEFORE else "frames")
        except (IntegrityError, StoreError, ManifestError):
            return True
        return False

    def _read_slices(self, places):
        with cloudckpt.open(self.url, store=self._store, verify="strict", **READING) as ckpt:
            for place in places:
                saved = self.state[place.key]
                if torch.is_tensor(saved):
                    row = place.plain.start // (saved.nbytes // len(saved)) + (place.plain.start > 0)
                    found = ckpt[place.key][row : row + 1]
                    assert found.tobytes() == saved[row : row + 1].view(torch.uint8).numpy().tobytes()
                else:
                    with ckpt.open_file(place.key) as file:
                        file.seek(place.plain.start)
                        assert len(file.read(1)) == 1

    def _load(self, verify):
        blank = {k: torch.full_like(v, NOTHING) if torch.is_tensor(v) else "" for k, v in self.state.items()}
        loaded = dict(blank)
        try:
            reader = ObjectStoreReader(self.url, store=self._store, verify=verify, **READING)
            dcp.load(loaded, storage_reader=reader, no_dist=True)
        except CheckpointException as e:
            if verify == "before":
                for key, saved in self.state.items():
                    is_text = not torch.is_tensor(saved)
                    assert loaded[key] in (saved, "") if is_text else is_sound_or_blank(loaded[key], saved), key
            raise next(iter(e.failures.values()))[0] from e
        for key, saved in self.state.items():
            assert torch.equal(loaded[key], saved) if torch.is_tensor(saved) else loaded[key] == saved, key


def is_sound_or_blank(found, saved):
    return bool(((found == saved) | (found == NOTHING)).all())


# What is injected.


def flipped(data, at, bit):
    altered = bytearray(data)
    altered[at] ^= 1 << bit
    return bytes(altered)


def injections(saved, rng):
    """Every kind of damage, sampled over every frame, every shard and the manifest."""
    yield from frame_flips(saved, rng)
    yield from header_flips(saved, rng)
    for key in saved.shards:
        yield from of_a_shard(saved, key, rng)
    first, second = saved.shards
    swapped = {first: saved.objects[second], second: saved.objects[first]}
    yield Injection("two shards swapped", partial(dict, swapped))
    yield from of_the_manifest(saved, rng)


def frame_flips(saved, rng):
    for place in saved.places:
        data = saved.objects[place.shard]
        inside = [rng.randrange(place.at.start, place.at.stop) for _ in range(SCALE)]
        middle = (place.at.start + place.at.stop) // 2
        ats = {"first byte": [place.at.start], "last byte": [place.at.stop - 1], "middle": [middle], "inside": inside}
        for where, some in ats.items():
            for at in some:
                change = {place.shard: flipped(data, at, rng.randrange(8))}
                yield Injection(f"a bit in a frame, {where}", partial(dict, change), place=place)


def header_flips(saved, rng):
    for key in saved.shards:
        if key.endswith(".safetensors"):
            data = saved.objects[key]
            nbytes = 8 + int.from_bytes(data[:8], "little")
            for at in (0, 7, nbytes - 1, *(rng.randrange(nbytes) for _ in range(4 * SCALE))):
                change = {key: flipped(data, at, rng.randrange(8))}
                yield Injection("a bit in a header", partial(dict, change), frozenset([DEEP]))


def of_a_shard(saved, key, rng):
    data, other = saved.objects[key], next(k for k in saved.shards if k != key)
    at = rng.randrange(1, len(data) - 1)
    for kind, altered in {
        "a shard short of a byte": data[:-1],
        "a shard cut in half": data[: len(data) // 2],
        "a shard cut to nothing": b"",
        "a shard without its first byte": data[1:],
        "a shard with a byte more in front": b"\0" + data,
        "a shard with a byte more within": data[:at] + b"\0" + data[at:],
        "another shard in its place": saved.objects[other],
        "an older save's shard": saved.older[key],
    }.items():
        yield Injection(kind, partial(dict, {key: altered}))
    yield Injection("a shard with a byte more behind", partial(dict, {key: data + b"\0"}), frozenset([DEEP]))
    yield Injection("a shard missing", partial(dict, {key: None}))


def of_the_manifest(saved, rng):
    data = saved.objects[MANIFEST]
    for at in (0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(24 * SCALE))):
        change = {MANIFEST: flipped(data, at, rng.randrange(8))}
        yield Injection("a bit in the manifest", partial(dict, change))
    for nbytes in (len(data) - 1, len(data) // 2, 1, 0, *(rng.randrange(len(data)) for _ in range(4 * SCALE))):
        yield Injection("a manifest cut off", partial(dict, {MANIFEST: data[:nbytes]}))


# What was found.


class Table:
    """Counts injections, and what each detector found of them."""

    def __init__(self, server):
        self.server = server
        self.injected: Counter[tuple[str, str]] = Counter()
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.unread: set[tuple[str, str, str]] = set()

    def lines(self):
        yield f"| of | damage | injected | {' | '.join(DETECTORS)} |"
        yield "| --- | --- | ---: |" + " ---: |" * len(DETECTORS)
        for (name, kind), n in self.injected.items():
            cells = [
                "reads right" if (name, kind, d) in self.unread else str(self.found[name, kind, d]) for d in DETECTORS
            ]
            yield f"| {name} | {kind} | {n} | {' | '.join(cells)} |"
        sums = [sum(n for (_, _, d), n in self.found.items() if d == detector) for detector in DETECTORS]
        yield f"| | all | {self.injected.total()} | {' | '.join(map(str, sums))} |"


@pytest.fixture(scope="module")
def table(server):
    found = Table(server.name)
    yield found
    print(f"\n\nOn {server.name}:\n\n" + "\n".join(found.lines()))


@pytest.mark.parametrize("name", CHAINS)
def test_every_damage_is_found_by_all_that_read_of_it(name, root, store_options, client, table):
    saved = Saved(CHAINS[name], root, store_options, client)
    assert len(saved.shards) == 2
    if name != "planes, zstd":
        assert len({len(saved.objects[key]) for key in saved.shards}) == 1
        assert {key: len(data) for key, data in saved.older.items()} == {
            k: len(saved.objects[k]) for k in saved.shards
        }
    assert [d for d in DETECTORS if saved.detected(d, None)] == [], "sound, nothing must be found"
    missed = []
    share = 1 if SCALE > 1 or table.server == "moto" else 3  # what is injected is the same on all servers
    for injection in list(injections(saved, random.Random(f"{SEED} {name}")))[::share]:
        change = injection.change()
        assert all(data != saved.objects[key] for key, data in change.items())
        saved.damage(change)
        table.injected[name, injection.kind] += 1
        for detector in DETECTORS:
            is_found = saved.detected(detector, injection.place)
            table.found[name, injection.kind, detector] += is_found
            if detector not in injection.found_by:
                assert not is_found
                table.unread.add((name, injection.kind, detector))
            elif not is_found:
                missed.append((detector, injection))
        saved.heal(change)
    assert [d for d in DETECTORS if saved.detected(d, None)] == [], "healed, nothing must be found"
    assert missed == []
    assert sum(n for (of, _), n in table.injected.items() if of == name) >= 100 // share
