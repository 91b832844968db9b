"""Ten rows of a large tensor that was compressed and encrypted: what a slice costs.

Law: counted by the requests and bytes that reading reports, beside the frames that the rows lie in.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import click

import cloudckpt
from cloudckpt.array import Array
from cloudckpt.engine.regions import Locator
from cloudckpt.engine.write import WriteOptions
from cloudckpt.extensions import AesGcm, BytePlane, Extension, ZStandard
from cloudckpt.manifest import unpack
from cloudckpt.store.url import StoreOptions

NAME = "rows"
NBYTES = 512 << 20
ROWS = 10
MOST_FRAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsFigure:
    """One read.

    Attributes:
        extensions: the chain's descriptors.
        nbytes: of the tensor, plain.
        stored_nbytes: of its shard.
        frames: that were fetched, at most: the bytes fetched, by those of the smallest stored frame, rounded down.
        requests: ranged GETs.
        bytes_needed, bytes_fetched: by them.
        seconds: of the read, the manifest's excluded.
    """

    extensions: Sequence[str]
    nbytes: int
    stored_nbytes: int
    frames: int
    requests: int
    bytes_needed: int
    bytes_fetched: int
    seconds: float


def measure(url: str, store: StoreOptions) -> RowsFigure:
    """Saves a bf16 tensor of `NBYTES` to ``url`` and reads `ROWS` of it, from a place where they cross a frame."""
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save

    from cloudckpt.dcp.writer import ObjectStoreWriter

    keys = {"bench": os.urandom(32)}
    chain: list[Extension] = [BytePlane(), ZStandard(level=1), AesGcm("bench", keys)]
    writer = ObjectStoreWriter(url, store=store, extensions=chain)
    width = 4096
    tensor = torch.empty(NBYTES // 2 // width, width, dtype=torch.bfloat16)
    tensor.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    click.echo(f"{NAME}: saving", err=True)
    save({"embedding": tensor}, storage_writer=writer, no_dist=True)
    checkpoint = cloudckpt.open(url, store=store, keys=keys)
    array = checkpoint["embedding"]
    assert isinstance(array, Array)  # noqa: S101 - for the type checker
    rows_per_frame = WriteOptions().frame_size // (2 * width)
    first = len(array) // 2 // rows_per_frame * rows_per_frame - ROWS // 2
    began = perf_counter()
    found = array[first : first + ROWS]
    seconds = perf_counter() - began
    if found.tobytes() != tensor[first : first + ROWS].view(torch.uint8).numpy().tobytes():
        msg = "the rows read are not those saved"
        raise click.ClickException(msg)
    contents = checkpoint._access.contents
    assert isinstance(contents, Locator)  # noqa: S101 - for the type checker
    smallest = min(min(unpack(shard.frame_sizes)) for shard in contents._manifest.shards)
    return RowsFigure(
        extensions=[extension.get_descriptor() for extension in chain],
        nbytes=NBYTES,
        stored_nbytes=contents.summary.stored_nbytes,
        frames=checkpoint.stats.bytes_fetched // smallest,
        requests=checkpoint.stats.requests,
        bytes_needed=checkpoint.stats.bytes_needed,
        bytes_fetched=checkpoint.stats.bytes_fetched,
        seconds=seconds,
    )
