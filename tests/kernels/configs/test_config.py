"""The one statement of which configurations are valid."""

import re
from dataclasses import replace

import pytest
import torch

from kernels.configs.config import Config, conv_k_blocks, k_blocks
from kernels.configs.convolution import ConvConfig
from kernels.configs.targets import TARGETS
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemProblem, StemWindowsConfig, Windows
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem, PairConfig
from kernels.operators.mean_linear import HeadConfig, HeadProblem
from kernels.problems import ConvProblem, Problem, Projection

CONV = ConvProblem(8, 64, 56, 56, 256, (1, 1), has_residual=True)
PADDED = replace(CONV, kernel=(3, 3), padding=(1, 1))
PROJECTED = replace(CONV, has_residual=False, projection=Projection(128, 56, 56, (1, 1)))
BOTTLENECK = BottleneckProblem(replace(PADDED, c_out=64, has_residual=False), 256, has_residual=True)
BOTTLENECK_PROJECTED = replace(BOTTLENECK, has_residual=False, projection=Projection(64, 56, 56, (1, 1)))
STEM = StemProblem(ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True))
HEAD = HeadProblem(8, 2048, 7, 7, 1000)

GATHERED = ConvConfig(128, 64, 32, 4, 3)
BOXES = replace(GATHERED, box=(1, 1, 128))
SQUARES = replace(GATHERED, box=(2, 8, 8))
FUSED = BottleneckConfig(128, 64, 64, 4, 2)
PAIR = PairConfig(GATHERED, GATHERED)
STRIPS = StemConfig(64, 64, 32, 2, 4, 2)
WINDOWS = StemWindowsConfig(32, 64, 128, 2, 4, 3)
MEANS = HeadConfig(16, 64, 32, 4)

REFUSED: dict[str, tuple[Problem, Config, str]] = {
    "float64": (CONV.with_dtype(torch.float64), GATHERED, "dtype is torch.float64, expected one of torch.float16"),
    "conv-kind": (CONV, MEANS, "is a HeadConfig, expected a ConvConfig"),
    "bottleneck-kind": (BOTTLENECK, GATHERED, "is a ConvConfig, expected a BottleneckConfig"),
    "block_m-48": (CONV, replace(GATHERED, block_m=48), "block_m is 48, expected a power of two of at least 16"),
    "block_q-8": (STEM, replace(STRIPS, block_q=8), "block_q is 8, expected a power of two of at least 16"),
    "warps-3": (CONV, replace(GATHERED, num_warps=3), "num_warps is 3, expected 1, 2, 4, 8 or 16"),
    "stages-0": (CONV, replace(GATHERED, num_stages=0), "num_stages is 0, expected at least 1"),
    "split_k-0": (CONV, replace(GATHERED, split_k=0), "split_k is 0, expected at least 1"),
    "pool_rows-0": (STEM, replace(STRIPS, pool_rows=0), "pool_rows is 0"),
    "too-many-groups": (
        replace(CONV, c_in=65536, c_out=65536, groups=65536), GATHERED, "65536 groups, expected at most 65535",
    ),
    "too-many-pixels": (replace(CONV, batch=2**20), GATHERED, "3288334336 output pixels, expected at most 2147483647"),
    "too-many-pixels-of-a-bottleneck": (
        replace(BOTTLENECK, first=replace(BOTTLENECK.first, batch=2**20)), FUSED, "output pixels, expected at most",
    ),
    "too-many-pixels-of-a-stem": (
        StemProblem(replace(STEM.conv, batch=2**20)), STRIPS, "output pixels, expected at most",
    ),
    "projection-groups": (replace(PROJECTED, groups=2), GATHERED, "2 groups beside a projection, expected 1"),
    "split_k-over-slices": (
        PADDED, replace(GATHERED, split_k=19), "split_k is 19, expected at most the 18 slices",
    ),
    "split_k-over-slices-of-a-projection": (PROJECTED, replace(GATHERED, split_k=7), "expected at most the 6 slices"),
    "box-projected-channels": (
        replace(PROJECTED, projection=Projection(40, 56, 56, (1, 1))), BOXES,
        "40 projected channels, expected a multiple of block_k 32",
    ),
    "box-of-another-size": (PADDED, replace(SQUARES, box=(1, 8, 8)), r"box is \(1, 8, 8\), expected 128 \(block_m\)"),
    "box-too-long": (
        CONV, replace(BOXES, block_m=512, block_n=16, num_warps=8, box=(1, 1, 512)), "at most 256 along each axis",
    ),
    "box-stride": (replace(PADDED, stride=(2, 2)), SQUARES, r"stride \(2, 2\), dilation \(1, 1\), 1 groups with a box"),
    "box-dilation": (replace(PADDED, dilation=(1, 2)), SQUARES, r"dilation \(1, 2\)"),
    "box-groups": (replace(PADDED, groups=2), SQUARES, "2 groups with a box"),
    "box-channels": (replace(PADDED, c_in=40), SQUARES, "40 channels with a box, expected a multiple of block_k 32"),
    "bottleneck-groups": (
        replace(BOTTLENECK, first=replace(BOTTLENECK.first, groups=2)), FUSED, "2 groups, expected 1",
    ),
    "bottleneck-box": (
        replace(BOTTLENECK, first=replace(BOTTLENECK.first, stride=(2, 2))), replace(FUSED, box=(2, 8, 8)),
        r"stride \(2, 2\), .* with a box",
    ),
    "pair-first": (BOTTLENECK, replace(PAIR, first=replace(GATHERED, block_m=1)), "block_m is 1"),
    "pair-second": (BOTTLENECK, replace(PAIR, second=replace(GATHERED, split_k=3)), "at most the 2 slices"),
    "stem-groups": (StemProblem(replace(STEM.conv, c_in=4, groups=2)), STRIPS, r"groups 2 and dilation \(1, 1\)"),
    "stem-dilation": (StemProblem(replace(STEM.conv, dilation=(2, 1))), STRIPS, r"groups 1 and dilation \(2, 1\)"),
    "windows-groups": (StemProblem(replace(STEM.conv, c_in=4, groups=2)), WINDOWS, r"groups 2 and dilation \(1, 1\)"),
    "windows-of-an-odd-width": (
        StemProblem(replace(STEM.conv, width=223)), WINDOWS, "windows of 3 channels are not aligned to 4 bytes",
    ),
    "windows-of-an-odd-step": (StemProblem(replace(STEM.conv, stride=(2, 1))), WINDOWS, "are not aligned to 4 bytes"),
    "windows-too-long": (
        StemProblem(replace(STEM.conv, c_in=32, kernel=(3, 3))), WINDOWS, "288 elements, expected at most 256",
    ),
    "windows-of-a-huge-image": (
        StemProblem(replace(STEM.conv, height=2**15, width=2**15)), WINDOWS, "an image has 3221225472 elements",
    ),
    "accumulators": (CONV, replace(GATHERED, block_m=256), "128 accumulators per thread, expected at most 64"),
    "bottleneck-accumulators": (
        replace(BOTTLENECK, first=replace(BOTTLENECK.first, c_out=65)), FUSED, "128 accumulators per thread",
    ),
    "stem-accumulators": (STEM, replace(STRIPS, block_q=256), "128 accumulators per thread"),
    "head-images": (HEAD, replace(MEANS, images=12), "images is 12, expected a power of two"),
    "head-shares": (HEAD, replace(MEANS, shares=17), "shares is 17, expected 1 to the 16 blocks of classes"),
    "head-accumulators": (HEAD, replace(MEANS, images=256), "128 accumulators per thread"),
    "shared-memory": (
        CONV, replace(GATHERED, num_stages=20), "up to 245760 bytes of shared memory, expected at most 232448 on sm_90",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_configs_are_refused(name: str) -> None:
    problem, config, message = REFUSED[name]
    reason = config.unsupported_reason(problem, TARGETS["sm_90"])
    assert reason is not None and re.search(message, reason), reason


@pytest.mark.parametrize(("problem", "config"), [(PADDED, SQUARES), (BOTTLENECK, replace(FUSED, box=(2, 8, 8)))])
def test_boxes_need_tma(problem: Problem, config: Config) -> None:
    reason = config.unsupported_reason(problem, TARGETS["sm_89"])
    assert reason == "a box needs TMA, expected sm_90 or newer instead of sm_89"


def test_hardware_limits_do_not_bind_the_interpreter() -> None:
    assert replace(GATHERED, block_m=1024, num_stages=99).unsupported_reason(CONV, None) is None
    assert replace(GATHERED, block_m=1000).unsupported_reason(CONV, None) is not None


def test_k_slices_span_taps_only_where_a_tap_is_short() -> None:
    assert k_blocks(49, 3, 32) == 5
    assert k_blocks(1, 3, 32) == 1
    assert k_blocks(9, 32, 32) == 9
    assert k_blocks(9, 100, 32) == 36
    assert conv_k_blocks(PROJECTED, 32) == (2, 4)
    assert conv_k_blocks(replace(CONV, c_in=64, groups=16, kernel=(3, 3)), 32) == (2, 0)


def test_shared_memory_bound_counts_the_largest_phase() -> None:
    pipeline = 3 * (128 + 64) * 32 * 2
    assert GATHERED.shared_memory(CONV) == pipeline
    shallow = replace(GATHERED, block_n=256, block_k=16, num_stages=1)
    assert shallow.shared_memory(CONV) == 128 * 256 * 2
    assert (replace(shallow, split_k=2)).shared_memory(CONV) == 128 * 256 * 4
    assert replace(shallow, block_m=32, block_n=32, split_k=2).shared_memory(CONV) == 2 * 32 * 32 * 4
    assert BOXES.shared_memory(CONV) == 1024 + pipeline
    assert GATHERED.shared_memory(PROJECTED) == pipeline
    assert BOXES.shared_memory(PROJECTED) == 1024 + 2 * pipeline + 128 * 64 * 2
    deeper = replace(GATHERED, num_stages=4)
    assert (PairConfig(GATHERED, deeper)).shared_memory(BOTTLENECK) == 4 * (128 + 64) * 32 * 2
    assert FUSED.shared_memory(BOTTLENECK) == 2 * (128 + 64) * 64 * 2
    wide = replace(FUSED, num_stages=1)
    assert wide.shared_memory(BOTTLENECK_PROJECTED) == 2 * (128 * 64 + 64 * 64 + (128 + 64) * 64)
    assert (replace(FUSED, box=(2, 8, 8))).shared_memory(BOTTLENECK) == 2 * (128 + 64) * 64 * 2 + 32768 + 1024
    assert STRIPS.shared_memory(STEM) == 64 * 64 * 4
    # K is 7 times 20 in vectors, in a slice of 128 and one of 16, and 7 others.
    assert WINDOWS.shared_memory(STEM) == (3 * 144 * 32 + 160 * 64) * 2 + 32 * 64 * 4
    assert (replace(STRIPS, num_stages=4)).shared_memory(STEM) == 4 * (64 + 64) * 32 * 2
    assert MEANS.shared_memory(HEAD) == 8 * 16 * 64 * 4, "as many partial sums as fit into 32 KiB"
    one_step = replace(MEANS, images=1, block_n=256, shares=4)
    assert one_step.shared_memory(HEAD) == 2 * (16 * 32 + 32 * 256) + 4 * 16 * 256


def windows(
    c_in: int, width: int, kernel: int, stride: int, padding: int, dtype: torch.dtype = torch.float16
) -> Windows | None:
    conv = replace(STEM.conv, c_in=c_in, width=width, dtype=dtype)
    return Windows.of(replace(conv, kernel=(3, kernel), stride=(1, stride), padding=(0, padding)))


def test_a_window_is_copied_in_the_largest_vectors_that_all_windows_are_aligned_to() -> None:
    """Of (vector, head, main, tail): the vectors start at the same place in every window, and none begins before it."""
    assert windows(3, 224, 7, 2, 3) == Windows(2, 1, 20, 0)
    assert windows(3, 224, 3, 2, 0) == Windows(2, 0, 8, 1)
    assert windows(4, 224, 7, 2, 3) == Windows(4, 0, 28, 0)
    assert windows(8, 31, 3, 1, 1) == Windows(8, 0, 24, 0)
    assert windows(1, 224, 7, 2, 3) == Windows(2, 1, 6, 0)
    assert windows(3, 223, 7, 1, 3, torch.float32) == Windows(1, 0, 21, 0)
    assert windows(3, 223, 7, 2, 3) is windows(3, 224, 7, 1, 3) is windows(1, 224, 1, 2, 0) is None


def test_k_of_windows_is_cut_into_whole_slices_and_a_short_last_one() -> None:
    assert WINDOWS.slices(STEM.conv) == (1, 16, 16)
    assert replace(WINDOWS, block_k=16).slices(STEM.conv) == (8, 16, 16)
    assert WINDOWS.slices(replace(STEM.conv, c_in=4)) == (1, 128, 0)
    assert WINDOWS.slices(replace(STEM.conv, c_in=4, padding=(3, 2), stride=(2, 1))) == (1, 128, 0)
    assert WINDOWS.slices(replace(STEM.conv, kernel=(2, 2), padding=(0, 0))) == (0, 16, 0)
