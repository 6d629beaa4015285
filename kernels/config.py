"""What a convolution is, what a launch configuration is, and which configuration goes with which convolution.

`ConvProblem` is the one description of a convolution that the launcher, the ahead-of-time compiler and the
heuristic share. `unsupported_reason` is the one statement of which configurations are valid.
"""

import functools
from dataclasses import dataclass

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INPUT_PRECISIONS = ("ieee", "tf32", "tf32x3")

# Output pixels are numbered in int32 inside the kernel: dividing int64 by P and Q costs several times as much.
MAX_PIXELS = 2**31 - 1
# CUDA's limit on the second and third grid axis; groups lie on the second.
MAX_GROUPS = 65535
# tl.dot's smallest tile side on every target for every dtype here.
MIN_BLOCK = 16
# float32 accumulators per thread. With 128 (128x128 on 4 warps, 128x256 on 8) the epilogue's residual tile spills
# on sm_90, where the accumulators also have to survive the layout change before the store.
MAX_ACCUMULATORS_PER_THREAD = 64
# Elements of x per thread and K slice when they cannot be loaded 16 bytes at a time: every element then holds its
# own address and mask, and 32 of them spill.
MAX_GATHERED_PER_THREAD = 16
# 8 rows of blocks share their weights in L2; more only helps when x does not fit there either.
GROUP_M = 8


@dataclass(frozen=True)
class Target:
    """A GPU architecture: compute capability (90 = 9.0), shared memory per block in bytes, multiprocessors."""

    name: str
    capability: int
    shared_memory: int
    multiprocessors: int

    @property
    def has_wgmma(self) -> bool:
        return self.capability == 90


# The multiprocessor count is that of the usual board and only steers the heuristic.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 80, 163 * 1024, 108),
        Target("sm_86", 86, 99 * 1024, 82),
        Target("sm_87", 87, 163 * 1024, 16),
        Target("sm_89", 89, 99 * 1024, 128),
        Target("sm_90", 90, 227 * 1024, 132),
        Target("sm_120", 120, 99 * 1024, 170),
    )
}


def conv_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels along one axis: floor((size + 2*padding - dilation*(kernel - 1) - 1) / stride) + 1."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class ConvProblem:
    """One conv2d_bias_act: sizes in elements, (height, width) pairs, dtype of all tensors, epilogue flags."""

    batch: int
    c_in: int
    height: int
    width: int
    c_out: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float16
    has_residual: bool = False
    relu: bool = False

    @property
    def out_height(self) -> int:
        return conv_output_size(self.height, self.kernel[0], self.stride[0], self.padding[0], self.dilation[0])

    @property
    def out_width(self) -> int:
        return conv_output_size(self.width, self.kernel[1], self.stride[1], self.padding[1], self.dilation[1])

    @property
    def c_in_per_group(self) -> int:
        return self.c_in // self.groups

    @property
    def gemm_m(self) -> int:
        """M = N * P * Q."""
        return self.batch * self.out_height * self.out_width

    @property
    def gemm_n(self) -> int:
        """N = C_OUT / GROUPS."""
        return self.c_out // self.groups

    @property
    def gemm_k(self) -> int:
        """K = R * S * C_IN / GROUPS."""
        return self.kernel[0] * self.kernel[1] * self.c_in_per_group

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolution; the epilogue is not counted."""
        return 2 * self.groups * self.gemm_m * self.gemm_n * self.gemm_k

    @property
    def bytes_moved(self) -> int:
        """Every tensor once; of x only the rows and columns under some tap (a strided 1x1 skips the others)."""
        rows = min(self.height, self.out_height * self.kernel[0])
        columns = min(self.width, self.out_width * self.kernel[1])
        outputs = self.gemm_m * self.c_out * (2 if self.has_residual else 1)
        weights = self.c_out * (self.gemm_k + 1)
        return (self.batch * rows * columns * self.c_in + weights + outputs) * self.dtype.itemsize

    @property
    def loads_are_vectors(self) -> bool:
        """Whether each pixel's channels of one group divide into 16-byte loads."""
        return self.c_in_per_group * self.dtype.itemsize % 16 == 0


@dataclass(frozen=True)
class ConvConfig:
    """One way to launch a ConvProblem: the tile, the block order, warps, pipeline stages and float32 precision.

    `input_precision` matters for float32 only: "ieee" is float32 throughout; "tf32" rounds both operands to an
    11-bit significand and runs on tensor cores.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = GROUP_M
    input_precision: str = "ieee"


def flatten_k(problem: ConvProblem, config: ConvConfig) -> bool:
    """Whether a K slice may span several taps: when one tap has fewer channels than the slice is long."""
    return problem.kernel != (1, 1) and problem.c_in_per_group < config.block_k


def k_blocks(problem: ConvProblem, config: ConvConfig) -> int:
    """Iterations of the K loop."""
    if flatten_k(problem, config):
        return -(-problem.gemm_k // config.block_k)
    return problem.kernel[0] * problem.kernel[1] * -(-problem.c_in_per_group // config.block_k)


def shared_memory_bound(problem: ConvProblem, config: ConvConfig) -> int:
    """Upper bound, in bytes, on the shared memory of one program.

    The larger of the pipeline's buffers and the tile that changes layout in the epilogue; they are not alive at
    the same time.
    """
    pipeline = config.num_stages * (config.block_m + config.block_n) * config.block_k
    epilogue = config.block_m * config.block_n
    return max(pipeline, epilogue) * problem.dtype.itemsize


def unsupported_reason(problem: ConvProblem, config: ConvConfig, target: Target | None) -> str | None:
    """Why `config` cannot run `problem` on `target`, or None if it can. No target means Triton's interpreter."""
    if problem.dtype not in KERNEL_DTYPES:
        return f"dtype is {problem.dtype}, expected one of {', '.join(map(str, KERNEL_DTYPES))}"
    if problem.gemm_m + config.block_m > MAX_PIXELS:
        return f"{problem.gemm_m} output pixels, expected at most {MAX_PIXELS} less one tile of {config.block_m}"
    if problem.groups > MAX_GROUPS:
        return f"{problem.groups} groups, expected at most {MAX_GROUPS}"
    for name in ("block_m", "block_n", "block_k"):
        block = getattr(config, name)
        if block < MIN_BLOCK or block & (block - 1):
            return f"{name} is {block}, expected a power of two of at least {MIN_BLOCK}"
    if config.num_warps not in (1, 2, 4, 8, 16):
        return f"num_warps is {config.num_warps}, expected 1, 2, 4, 8 or 16"
    if config.num_stages < 1 or config.group_m < 1:
        return f"num_stages and group_m are {config.num_stages} and {config.group_m}, expected at least 1"
    if config.input_precision not in INPUT_PRECISIONS:
        return f"input_precision is {config.input_precision!r}, expected one of {', '.join(INPUT_PRECISIONS)}"
    if target is None:
        return None
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    if accumulators > MAX_ACCUMULATORS_PER_THREAD:
        return f"{accumulators} accumulators per thread, expected at most {MAX_ACCUMULATORS_PER_THREAD}"
    shared = shared_memory_bound(problem, config)
    if shared > target.shared_memory:
        return f"up to {shared} bytes of shared memory, expected at most {target.shared_memory} on {target.name}"
    return None


# (block_m, block_n, num_warps), largest first. Beyond 128x128 a tile spills; at 64 rows and fewer the weights are
# read so often that a smaller tile only pays when it is what fills the GPU.
_TENSOR_CORE_TILES = (
    (128, 128, 8),
    (128, 64, 4),
    (64, 64, 4),
    (64, 32, 4),
    (32, 32, 4),
    (128, 16, 4),
    (64, 16, 4),
)
# IEEE float32 runs on the ordinary FMA units: a thread keeps slices of both operands in registers, so 32
# accumulators are enough work and leave room for them. 32x64 and not 64x32: there ptxas squeezes a 3x3 convolution
# into 80 registers for one more block per multiprocessor, and spills on sm_90 and sm_120.
_FMA_TILES = (
    (64, 64, 4),
    (32, 64, 4),
    (32, 32, 4),
    (64, 16, 4),
)


def _block_k(problem: ConvProblem) -> int:
    if problem.dtype == torch.float32:
        return 16
    # 64 half-precision channels are one 128-byte line per pixel. Not when K would then be a single slice, which
    # leaves nothing to pipeline, nor when element-wise loads would need twice the registers.
    if problem.c_in_per_group >= 64 and problem.gemm_k > 64 and problem.loads_are_vectors:
        return 64
    return 32


def _tile(problem: ConvProblem, target: Target) -> tuple[int, int, int]:
    on_tensor_cores = problem.dtype != torch.float32
    tiles = _TENSOR_CORE_TILES if on_tensor_cores else _FMA_TILES
    # A tile wider than C_OUT computes columns nobody stores; narrower than 32 re-reads x for every 16 columns.
    widest = max(MIN_BLOCK, 1 << (problem.gemm_n - 1).bit_length())
    narrowest = min(32, widest)
    # Below 64 rows sm_90 falls back from WGMMA to the HMMA of its predecessors.
    fewest_rows = 64 if on_tensor_cores and target.has_wgmma else 32
    fitting = [tile for tile in tiles if narrowest <= tile[1] <= widest and tile[0] >= fewest_rows]
    for block_m, block_n, num_warps in fitting:
        programs = -(-problem.gemm_m // block_m) * -(-problem.gemm_n // block_n) * problem.groups
        if programs >= target.multiprocessors:
            return block_m, block_n, num_warps
    # Batch 1: no tile fills the GPU, the smallest comes nearest.
    return fitting[-1]


@functools.lru_cache(maxsize=4096)
def select_config(problem: ConvProblem, target: Target) -> ConvConfig:
    """The configuration with which to run `problem` on `target`.

    Raises:
        ValueError: no configuration can run it (dtype, too many output pixels or groups).
    """
    block_m, block_n, num_warps = _tile(problem, target)
    block_k = _block_k(problem)
    if not problem.loads_are_vectors and block_m * block_k > MAX_GATHERED_PER_THREAD * 32 * num_warps:
        num_warps *= 2
    config = ConvConfig(block_m, block_n, block_k, num_warps, num_stages=2)
    # s stages keep s - 1 slices in flight: as many as there are and as fit. Beyond 4 the extra ones only take shared
    # memory from a second program on the same multiprocessor.
    for num_stages in range(min(4, k_blocks(problem, config) + 1), 2, -1):
        deeper = ConvConfig(block_m, block_n, block_k, num_warps, num_stages)
        if unsupported_reason(problem, deeper, target) is None:
            config = deeper
            break
    reason = unsupported_reason(problem, config, target)
    if reason is not None:
        raise ValueError(f"no configuration for {problem} on {target.name}: {reason}")
    return config
