"""What is saved and loaded.

Law: the same bytes in every process, made without needing much more memory than they take.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

State = dict[str, Any]
"""Names to torch tensors, to plain values, and to more of such dicts."""

Kind = Literal["uniform", "adam", "lora"]

LORA_NBYTES = 2 * 4 * 32 * 4096 * 16 * 2
_SEED_NBYTES = 8 << 20
"""Made by the random generator; the rest are rotations of it, far enough apart for a compressor not to see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A state dict, and who handles it how often.

    Attributes:
        name: what it is asked for by.
        kind: ``uniform``: bf16 tensors of one size, each rounded down to whole rows; ``adam``: a small
            transformer of fp32 and what torch.optim.Adam keeps of it; ``lora``: an adapter of rank 16 for a
            model of 7 B, bf16.
        nbytes: of the state dict, about; of a uniform one but for what is rounded down.
        tensors: how many, of a uniform one.
        period: bytes after which every tensor repeats itself, all in the same way; None for noise.
        rounds: that are measured.
        has_warm_up: whether a save and a load of the whole state come before the first round.
        contenders: names of those it is for when none are named.
    """

    name: str
    kind: Kind = "uniform"
    nbytes: int
    tensors: int = 1
    period: int | None = None
    rounds: int
    has_warm_up: bool = True
    contenders: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of each tensor of a uniform one."""
        return (max(1, self.nbytes // self.tensors // 2048), 1024)

    @property
    def description(self) -> str:
        """What it is, for people."""
        if self.kind == "adam":
            return "fp32 Adam state"
        if self.kind == "lora":
            return "a LoRA adapter in 256 tensors of bf16"
        return f"bf16 in {self.tensors} tensor{'s' * (self.tensors > 1)}"


RAW = ("raw-sockets", "raw-aiobotocore", "raw-boto3", "raw-obstore")
PEERS = ("fsspec", "fsspec-8", "s3torchconnector")


def all_workloads(*, size: int, tensors: int, one_tensor_size: int, rounds: int) -> dict[str, Workload]:
    """Every workload by its name."""
    small = 10_000 * 4096
    everyone = ("cloudckpt", *PEERS, "fsspec-default", "filesystem", *RAW)
    few = ("cloudckpt", "fsspec", "s3torchconnector", "raw-sockets")  # each of them keeps all of it in memory
    known = [
        Workload(name="bf16-128", nbytes=size, tensors=tensors, rounds=rounds, contenders=everyone),
        Workload(
            name="stock",  # all save it alike, as torch does
            nbytes=size,
            tensors=tensors,
            rounds=rounds,
            contenders=("cloudckpt-stock", "fsspec", "fsspec-default"),
        ),
        Workload(
            name="one-tensor",
            nbytes=one_tensor_size,
            rounds=1,  # for its memory: its seconds are those of the other workload
            has_warm_up=False,
            contenders=("cloudckpt", "cloudckpt-zstd", "cloudckpt-zstd-slow"),
        ),
        Workload(name="small", nbytes=small, tensors=10_000, rounds=rounds, contenders=few),
        Workload(name="small-as-one", nbytes=small, rounds=rounds, contenders=few),
        Workload(name="two-gib", nbytes=2 << 30, rounds=rounds, contenders=few),
        Workload(name="adam", kind="adam", nbytes=size, rounds=rounds, contenders=("cloudckpt", *PEERS)),
        Workload(name="lora", kind="lora", nbytes=LORA_NBYTES, rounds=rounds, contenders=("cloudckpt", *PEERS)),
    ]
    return {workload.name: workload for workload in known}


def repeating(workload: Workload, period: int) -> Workload:
    """The same for a server that keeps one period of it: for us and the raw references."""
    return replace(workload, period=period, contenders=("cloudckpt", *RAW))


def small(workload: Workload) -> Workload:
    """A tensor of the same sort, to set clients up with."""
    return replace(workload, kind="uniform", nbytes=2048, tensors=1)


def make_state(workload: Workload, *, is_flat: bool = False) -> State:
    """Tensors with values like those of weights, no two alike, or of one period; every page touched.

    Nothing else is allocated: what the allocator kept of it would count as memory that was there before.

    Args:
        workload: what to make.
        is_flat: make one tensor of as many bytes.
    """
    import torch

    if is_flat:
        nbytes = sum(tensor.nbytes for tensor in all_tensors(_empty(workload, "meta")))
        state: State = {"flat": torch.empty(nbytes // 2, dtype=torch.bfloat16)}
    else:
        state = _empty(workload, "cpu")
    flat = [tensor.view(-1) for tensor in all_tensors(state)]
    if workload.period is None:
        _fill_with_noise(flat)
    else:
        _fill_with_period(flat, workload.period)
    return state


def all_tensors(state: Any) -> Iterator[Any]:
    """The tensors in a state dict, depth first."""
    if isinstance(state, Mapping):
        for value in state.values():
            yield from all_tensors(value)
    elif hasattr(state, "data_ptr"):
        yield state


def clear(state: State) -> None:
    """Overwrites every tensor, so that a load that does nothing is found out."""
    for tensor in all_tensors(state):
        tensor.zero_()


def fingerprint(state: State) -> list[int]:
    """A CRC-32 of each tensor's bytes."""
    import torch

    return [zlib.crc32(tensor.view(-1).view(torch.uint8).numpy()) for tensor in all_tensors(state)]


def _empty(workload: Workload, device: str) -> State:
    """The state dict, its tensors yet to be filled."""
    import torch

    if workload.kind == "adam":
        return _adam(_transformer(workload.nbytes), device)
    if workload.kind == "lora":
        shapes = {
            f"layers.{layer}.{matrix}.lora_{side}": shape
            for layer in range(32)
            for matrix in ("q_proj", "k_proj", "v_proj", "o_proj")
            for side, shape in (("A", (16, 4096)), ("B", (4096, 16)))
        }
    else:
        shapes = {f"layers.{i}.weight": workload.shape for i in range(workload.tensors)}
    return {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}


def _transformer(nbytes: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one whose fp32 weights and Adam moments take about so many bytes."""
    width = 1024 if nbytes >= 512 << 20 else 256
    layer: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.up.weight": (4 * width, width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width),
        "mlp.down.bias": (width,),
    }
    count = max(1, nbytes // (12 * sum(map(prod, layer.values()))))
    return {f"layers.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}


def _adam(shapes: Mapping[str, tuple[int, ...]], device: str) -> State:
    """As ``model.state_dict()`` and ``torch.optim.Adam(...).state_dict()`` have it."""
    import torch

    def empty(shape: tuple[int, ...] = ()) -> Any:
        return torch.empty(shape, dtype=torch.float32, device=device)

    moments = {
        i: {"step": empty(), "exp_avg": empty(shape), "exp_avg_sq": empty(shape)}
        for i, shape in enumerate(shapes.values())
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": list(moments)}
    model = {name: empty(shape) for name, shape in shapes.items()}
    return {"model": model, "optim": {"state": moments, "param_groups": [group]}}


def _fill_with_noise(flat: Sequence[Any]) -> None:
    import torch

    largest = max(flat, key=lambda tensor: tensor.numel())
    seed = largest[: _SEED_NBYTES // largest.itemsize]
    seed.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    for index, tensor in enumerate(flat):
        for at, start in enumerate(range(0, tensor.numel(), seed.numel())):
            if tensor is not largest or at:
                piece = tensor[start : start + seed.numel()]
                _copy_rotated(seed, piece, by=(4099 * at + 7919 * index) % seed.numel())


def _copy_rotated(seed: Any, piece: Any, by: int) -> None:
    head = min(seed.numel() - by, piece.numel())
    piece[:head] = seed[by : by + head]
    piece[head:] = seed[: piece.numel() - head]


def _fill_with_period(flat: Sequence[Any], period: int) -> None:
    import torch

    if any(tensor.nbytes % period for tensor in flat):
        msg = f"this server keeps {period} bytes of what repeats itself; a tensor here is not a multiple of that"
        raise ValueError(msg)
    first = torch.empty(period // 2, dtype=torch.bfloat16)
    first.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    for tensor in flat:
        tensor.view(torch.uint8).view(-1, period)[:] = first.view(torch.uint8)
