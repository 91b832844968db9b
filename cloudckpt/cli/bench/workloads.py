"""What is saved and loaded.

Law: the same bytes in every process, made without needing much more memory than they take.
"""

import zlib
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]
"""Names to torch tensors."""

_SEED_NBYTES = 8 << 20
"""Made by the random generator; the rest are rotations of it, far enough apart for a compressor not to see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A state dict of bf16 tensors of one size, and who handles it how often.

    Attributes:
        name: what it is asked for by.
        nbytes: of the state dict; each tensor is rounded down to whole rows.
        tensors: how many.
        rounds: that are measured.
        has_warm_up: whether a save and a load of the whole state come before the first round.
        contenders: names of those it is for when none are named.
    """

    name: str
    nbytes: int
    tensors: int
    rounds: int
    has_warm_up: bool
    contenders: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of each tensor."""
        return (max(1, self.nbytes // self.tensors // 2048), 1024)


def all_workloads(*, size: int, tensors: int, one_tensor_size: int, rounds: int) -> dict[str, Workload]:
    """Every workload by its name."""
    known = [
        Workload(
            name="bf16-128",
            nbytes=size,
            tensors=tensors,
            rounds=rounds,
            has_warm_up=True,
            contenders=("cloudckpt", "fsspec", "fsspec-8"),
        ),
        Workload(
            name="stock",  # all save it alike, as torch does
            nbytes=size,
            tensors=tensors,
            rounds=rounds,
            has_warm_up=True,
            contenders=("cloudckpt-stock", "fsspec", "fsspec-default"),
        ),
        Workload(
            name="one-tensor",
            nbytes=one_tensor_size,
            tensors=1,
            rounds=1,  # for its memory: its seconds are those of the other workload
            has_warm_up=False,
            contenders=("cloudckpt", "cloudckpt-zstd", "cloudckpt-zstd-slow"),
        ),
    ]
    return {workload.name: workload for workload in known}


def make_state(workload: Workload) -> State:
    """Tensors with values like those of weights, no two alike, every page touched.

    Nothing else is allocated: what the allocator kept of it would count as memory that was there before.
    """
    import torch

    state = {f"layers.{i}.weight": torch.empty(workload.shape, dtype=torch.bfloat16) for i in range(workload.tensors)}
    flat = [tensor.view(-1) for tensor in state.values()]
    seed = flat[0][: _SEED_NBYTES // 2]
    seed.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    for index, tensor in enumerate(flat):
        for at, start in enumerate(range(0, tensor.numel(), seed.numel())):
            if index or at:
                piece = tensor[start : start + seed.numel()]
                _copy_rotated(seed, piece, by=(4099 * at + 7919 * index) % seed.numel())
    return state


def _copy_rotated(seed: Any, piece: Any, by: int) -> None:
    head = min(seed.numel() - by, piece.numel())
    piece[:head] = seed[by : by + head]
    piece[head:] = seed[: piece.numel() - head]


def clear(state: State) -> None:
    """Overwrites every tensor, so that a load that does nothing is found out."""
    for tensor in state.values():
        tensor.zero_()


def fingerprint(state: State) -> dict[str, int]:
    """A CRC-32 of each tensor's bytes."""
    import torch

    return {name: zlib.crc32(tensor.view(torch.uint8).numpy()) for name, tensor in state.items()}
