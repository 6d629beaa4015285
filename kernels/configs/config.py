"""How a problem is launched: what every kind of configuration knows, and which ones are valid for which problem.

A kind says which problems it runs, why it cannot run one of them, how much shared memory and how many accumulators that
takes, and what is passed to which kernel. `Config.unsupported_reason` is what the rules, the tuner and the tests share.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch

from kernels.configs.targets import Target
from kernels.problems import KERNEL_DTYPES, ConvProblem, Problem

# Output pixels are numbered in int32 inside the kernels: dividing int64 by P and Q costs several times as much.
MAX_PIXELS = 2**31 - 1
# tl.dot's smallest tile side on every target for every dtype here.
MIN_BLOCK = 16
# float32 accumulators per thread. With 128 (128x128 on 4 warps, 128x256 on 8) the epilogue's residual tile spills
# on sm_90, where the accumulators also have to survive the layout change before the store.
MAX_ACCUMULATORS_PER_THREAD = 64
# TMA: pixels per axis of one box, and the barriers that each pipeline stage keeps in shared memory.
MAX_BOX = 256
BARRIER_BYTES = 1024
# Of a split K: what the last program has on its way to shared memory at a time, if that is more than one tile.
PARTIAL_SUM_BYTES = 32768

Box = tuple[int, int, int]


@dataclass(frozen=True)
class Operand:
    """A tensor parameter of a kernel: a pointer to `dtype`, or with a block a TMA descriptor of such blocks.

    Attributes:
        block: sides of one block, of a tensor that the descriptor sees as `view` says.
        view: "filters" C_OUT x K, "pixels" N, H, W, C, or "rows": all pixels in one row of one image.
        step: of the pixels, only every such row and column.
    """

    dtype: torch.dtype
    block: tuple[int, ...] | None = None
    view: str = ""
    step: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of one kernel: everything but the tensors.

    Attributes:
        kernel: the file in kernels/jit and the function: `head._mean_linear_kernel`.
        problem, config: what it computes and how.
        operands: its tensor parameters by name; None is passed as None.
        scalars: every other parameter by name.
        grid: programs along each axis.
        options: num_warps, num_stages and the other options of the compiler.
        tiles, partials: of a split K: counters, and float32 elements of partial sums; else 0.
        tensors: the names of the operator's tensors, where a kernel has others for them.
        output: what it writes: `y`, or what a later launch of the same plan reads under that name.
    """

    kernel: str
    problem: Problem
    config: "Config"
    operands: Mapping[str, Operand | None]
    scalars: Mapping[str, Any]
    grid: tuple[int, ...]
    options: Mapping[str, int | bool]
    tiles: int = 0
    partials: int = 0
    tensors: Mapping[str, str] | None = None
    output: str = "y"

    @property
    def uses_boxes(self) -> bool:
        """Whether it loads through TMA descriptors."""
        return any(operand is not None and operand.block is not None for operand in self.operands.values())


@dataclass(frozen=True)
class Config:
    """One way to launch the problems of one kind.

    Every kind is a frozen dataclass of sizes: `block_...` the sides of a tile, `num_warps` and `num_stages` warps per
    program and stages of the software pipeline.
    """

    kind: ClassVar[str]
    runs: ClassVar[type]
    kinds: ClassVar[dict[str, type["Config"]]] = {}

    def __init_subclass__(cls, *, kind: str = "", runs: type = object) -> None:
        if kind:
            cls.kind, cls.runs, Config.kinds[kind] = kind, runs, cls

    def unsupported_reason(self, problem: Problem, target: Target | None) -> str | None:
        """Why it cannot run `problem` on `target`, or None if it can. No target means Triton's interpreter."""
        if problem.dtype not in KERNEL_DTYPES:
            return f"dtype is {problem.dtype}, expected one of {', '.join(map(str, KERNEL_DTYPES))}"
        if not isinstance(problem, self.runs):
            expected = next(kind for kind in Config.kinds.values() if isinstance(problem, kind.runs))
            return f"{self} is a {type(self).__name__}, expected a {expected.__name__}"
        reason = self._size_reason() or self.problem_reason(problem, target)
        if reason is not None or target is None:
            return reason
        accumulators = self.accumulators(problem)
        if accumulators > MAX_ACCUMULATORS_PER_THREAD:
            return f"{accumulators} accumulators per thread, expected at most {MAX_ACCUMULATORS_PER_THREAD}"
        shared = self.shared_memory(problem) + target.barrier_bytes
        if shared > target.shared_memory:
            return f"up to {shared} bytes of shared memory, expected at most {target.shared_memory} on {target.name}"
        return None

    def _size_reason(self) -> str | None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name.startswith("block_") and (value < MIN_BLOCK or value & (value - 1)):
                return f"{name} is {value}, expected a power of two of at least {MIN_BLOCK}"
            if name == "num_warps" and value not in (1, 2, 4, 8, 16):
                return f"num_warps is {value}, expected 1, 2, 4, 8 or 16"
            if name in ("num_stages", "split_k", "pool_rows") and value < 1:
                return f"{name} is {value}, expected at least 1"
        return None

    @abstractmethod
    def problem_reason(self, problem: Any, target: Target | None) -> str | None:
        """Why it cannot run a problem of its kind, whatever the target's registers and memory; its sizes are valid."""

    @abstractmethod
    def shared_memory(self, problem: Any) -> int:
        """Upper bound, in bytes, on the shared memory of one program.

        A kernel's phases are not alive at the same time: the pipeline's buffers, then the tile that changes layout in
        the epilogue.
        """

    @abstractmethod
    def accumulators(self, problem: Any) -> int:
        """float32 accumulators per thread of the largest tile."""

    @abstractmethod
    def launches(self, problem: Any, target: Target | None) -> tuple[KernelLaunch, ...]:
        """The launches of a problem for which it is valid, in order. No target: the interpreter."""

    def changes(self, problem: Any) -> Iterator["Config"]:
        """Configurations that differ from this one in one decision, valid or not."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("block_") or field.name in ("num_warps", "pool_rows"):
                yield from self._resized(problem, field.name, value * 2, value // 2)
            elif field.name == "num_stages":
                yield from self._resized(problem, field.name, value + 1, value - 1)

    def _resized(self, problem: Any, name: str, *values: int) -> Iterator["Config"]:
        for value in values:
            if value >= 1:
                yield self.with_size(problem, name, value)

    def with_size(self, problem: Any, name: str, value: int) -> "Config":
        return replace(self, **{name: value})

    def without_boxes(self) -> "Config":
        """The same through pointers, for tensors that TMA does not take."""
        return self

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> "Config":
        """Raises AttributeError, KeyError, TypeError or ValueError for what `to_json` does not write."""
        sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        return Config.kinds[sizes.pop("kind")].of_sizes(sizes)

    @classmethod
    def of_sizes(cls, sizes: Mapping[str, Any]) -> "Config":
        return cls(**sizes)


def launch_options(num_warps: int, num_stages: int, target: Target | None) -> dict[str, int | bool]:
    """Contraction to FMA is asked for by name: its default differs between Triton versions."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return {**options, "launch_pdl": True} if uses_pdl(target) else options


def partial_sum_bytes(tile: int, splits: int) -> int:
    """Shared memory in which `splits` partial tiles of so many elements arrive."""
    return 4 * tile * max(1, min(splits, PARTIAL_SUM_BYTES // (4 * tile)))


def uses_pdl(target: Target | None) -> bool:
    return target is not None and target.has_pdl


def pixel_reason(pixels: int, block_m: int) -> str | None:
    if pixels + block_m > MAX_PIXELS:
        return f"{pixels} output pixels, expected at most {MAX_PIXELS} less one tile of {block_m}"
    return None


def box_reason(conv: ConvProblem, box: Box, block_m: int, block_k: int, target: Target | None) -> str | None:
    """Why TMA cannot load a convolution in such boxes of pixels, or None if it can."""
    if target is not None and not target.has_tma:
        return f"a box needs TMA, expected sm_90 or newer instead of {target.name}"
    if math.prod(box) != block_m or max(box) > MAX_BOX:
        return f"box is {box}, expected {block_m} (block_m) pixels and at most {MAX_BOX} along each axis"
    if (conv.stride, conv.dilation, conv.groups) != ((1, 1), (1, 1), 1):
        return (
            f"stride {conv.stride}, dilation {conv.dilation}, {conv.groups} groups with a box,"
            f" expected (1, 1), (1, 1), 1"
        )
    if conv.c_in % block_k:
        return f"{conv.c_in} channels with a box, expected a multiple of block_k {block_k}"
    return None


def k_blocks(taps: int, channels: int, block_k: int) -> int:
    """Slices of block_k into which K is cut: across taps where one tap has fewer channels than a slice is long."""
    if taps > 1 and channels < block_k:
        return -(-taps * channels // block_k)
    return taps * -(-channels // block_k)


def conv_k_blocks(problem: ConvProblem, block_k: int) -> tuple[int, int]:
    """K slices of the convolution and of its projection."""
    taps = problem.kernel[0] * problem.kernel[1]
    projected = k_blocks(1, problem.projection.c_in, block_k) if problem.projection else 0
    return k_blocks(taps, problem.c_in_per_group, block_k), projected


def warps_of(block_m: int, block_n: int, num_warps: int) -> tuple[int, int]:
    """How Triton divides a tile between warps: rows and columns of them, their parts as near to a square as can be."""
    rows = columns = 1
    while rows * columns < num_warps:
        if block_m // rows > block_n // columns:
            rows *= 2
        else:
            columns *= 2
    return rows, columns
