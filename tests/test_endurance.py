"""Many saves in a row, with a fault in each and sweeps beside them: the newest is always there, and nothing piles up.

``FAULT_SAVES`` says how many; without it 60 on servers that keep what they have on disk, and 30 on others.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from random import Random
from secrets import token_hex

import pytest

from cloudckpt.catalog import newest_step, step_url, sweep
from cloudckpt.engine import loop
from cloudckpt.layout import MANIFEST
from cloudckpt.manifest import parse
from cloudckpt.store.url import open_store
from conftest import BUCKET, s3_of
from fault_matrix import WORKS, Matrix, wrong_with
from fault_ranks import is_equal, load

SAVES = os.environ.get("FAULT_SAVES")
SEED = int(os.environ.get("FAULT_SEED", "1"))
GRACE_S = 20
"""More than any save takes here, with its fault."""

STEADY = 20
"""Saves after which a process holds what it will hold."""


@pytest.mark.timeout(3600)
def test_the_newest_checkpoint_is_always_there_and_nothing_piles_up(server, s3, store_options, capsys):
    random, root = Random(SEED), f"s3://{BUCKET}/{token_hex(6)}"
    saves = int(SAVES or (60 if server.durable else 30))
    newest, failed, swept, held = None, 0, 0, []
    with Matrix(server, BUCKET, s3_of(server)) as matrix, ThreadPoolExecutor(1) as beside:
        works = tuple(work for work in WORKS if work.do == "save" and not work.overwrite and not work.fails_first)
        cases = [case for case in matrix.cases(works) if not case.may_be_damaged]
        for step in range(saves):
            case = random.choice(cases)
            sweeping = None
            if random.random() < 0.5:
                sweeping = beside.submit(sweep, root, grace_s=GRACE_S, dry_run=False, store=store_options)
            facts, seed = matrix.run_at(step_url(root, step), case)
            swept += 0 if sweeping is None else len(sweeping.result().removed)
            assert wrong_with(case, facts) == [], case.name
            failed += any(f["error"] for f in facts)
            if facts[0]["is_committed"]:
                newest = step, case.work.workload, seed
            held.append([(f["sockets"], f["nbytes"]) for f in facts])
            if newest is not None:
                assert newest_step(root, store_options) == newest[0]
                assert is_equal(load(step_url(root, newest[0]), newest[1], s3), *newest[1:])
    for _ in range(2):  # the second takes the tombstones of the first, where deletes know conditions
        sweep(root, grace_s=0, dry_run=False, include_whole=True, store=store_options)
    objects, uploads, named = everything(root, store_options)
    early, late = (held[min(i, saves) - 1] for i in (STEADY, saves))
    with capsys.disabled():
        print(
            f"\n{server.name}: {saves} saves, a fault in each, {failed} failed; {swept} attempts swept meanwhile; "
            f"{len(named)} objects that manifests name, {len(objects - named)} others, {len(uploads)} uploads at the "
            f"end; sockets and MiB of each rank {shown(early)} after {STEADY} saves, {shown(late)} after {saves}"
        )
    assert objects == named
    assert uploads == []
    for (sockets, nbytes), (sockets_then, nbytes_then) in zip(late, early, strict=True):
        assert sockets <= sockets_then + 4
        assert nbytes <= nbytes_then * 1.1


def shown(held):
    return [(sockets, nbytes >> 20) for sockets, nbytes in held]


def everything(root, options):
    """All keys and uploads below a URL, and the keys that its manifests name, their own among them."""

    async def look():
        async with open_store(root, options) as store:
            objects = {found.key async for found in store.list_objects()}
            uploads = [upload.key async for upload in store.list_uploads()]
            named = set()
            for key in objects:
                if key.endswith(MANIFEST):
                    prefix = key.removesuffix(MANIFEST)
                    made = parse((await store.get(key)).data, key)
                    named |= {key, *(prefix + shard.key for shard in made.shards)}
            return objects, uploads, named

    return loop.run(look)
