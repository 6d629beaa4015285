"""Sizes and costs of problems, by numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.problems import ConvProblem, Problem, Projection

CONV = ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True)
STRIDED = ConvProblem(1, 256, 56, 56, 512, (1, 1), (2, 2), has_residual=True, dtype=torch.float32)
PROJECTED = ConvProblem(4, 128, 28, 28, 512, (1, 1), relu=True, projection=Projection(256, 56, 56, (2, 2)))
FIRST = ConvProblem(2, 64, 56, 56, 64, (3, 3), padding=(1, 1), relu=True)
BOTTLENECK = BottleneckProblem(FIRST, 256, has_residual=True, relu=True)
PIXELS, SHORTCUT = 2 * 56 * 56, Projection(64, 56, 56, (1, 1))
# Shape of the output, FLOPs, elements of activations and of weights.
COSTS: dict[str, tuple[Problem, tuple[int, ...], int, int, int]] = {
    "conv": (CONV, (8, 64, 112, 112), 2 * 100352 * 64 * 147, 8 * (224**2 * 3 + 112**2 * 64), 64 * 148),
    "groups": (
        ConvProblem(1, 128, 8, 8, 128, (3, 3), padding=(1, 1), groups=32),
        (1, 128, 8, 8), 2 * 64 * 128 * 36, 2 * 64 * 128, 128 * 37,
    ),
    # A strided convolution reads only the pixels under its taps.
    "strided-1x1": (STRIDED, (1, 512, 28, 28), 2 * 784 * 512 * 256, 784 * (256 + 2 * 512), 512 * 257),
    "strided-3x3": (
        replace(STRIDED, kernel=(3, 3), padding=(1, 1)),
        (1, 512, 28, 28), 2 * 784 * 512 * 2304, 56**2 * 256 + 2 * 784 * 512, 512 * 2305,
    ),
    "projection": (PROJECTED, (4, 512, 28, 28), 8 * 784 * 512 * 384, 4 * 784 * (128 + 256 + 512), 512 * 385),
    # What lies between is neither written nor read.
    "bottleneck": (
        BOTTLENECK,
        (2, 256, 56, 56), 2 * PIXELS * (64 * 576 + 256 * 64), PIXELS * (64 + 256 + 256), 64 * 577 + 256 * 65,
    ),
    "bottleneck-projection": (
        replace(BOTTLENECK, has_residual=False, projection=SHORTCUT),
        (2, 256, 56, 56), 2 * PIXELS * (64 * 576 + 256 * 128), PIXELS * (64 + 64 + 256), 64 * 577 + 256 * 129,
    ),
    "stem": (StemProblem(CONV), (8, 64, 56, 56), 2 * 100352 * 64 * 147, 8 * (224**2 * 3 + 56**2 * 64), 64 * 148),
    "head": (HeadProblem(32, 2048, 7, 7, 1000), (32, 1000), 64 * 2048 * 1000, 32 * (2048 * 49 + 1000), 1000 * 2049),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_costs(name: str) -> None:
    problem, shape, flops, activations, weights = COSTS[name]
    size = problem.dtype.itemsize
    assert (problem.out_shape, problem.flops) == (shape, flops)
    assert (problem.activation_bytes, problem.weight_bytes) == (size * activations, size * weights)


def test_dense_means_a_matrix_product() -> None:
    dense = ConvProblem(1, 64, 7, 7, 64, (1, 1))
    assert dense.is_dense and replace(dense, projection=Projection(32, 7, 7, (1, 1))).is_dense
    strided = Projection(32, 14, 14, (2, 2))
    others = ({"kernel": (3, 3), "padding": (1, 1)}, {"stride": (2, 2)}, {"padding": (1, 1)}, {"projection": strided})
    assert not any(replace(dense, **changes).is_dense for changes in others)


def test_loads_are_vectors_of_16_bytes() -> None:
    problem = ConvProblem(1, 8, 7, 7, 64, (1, 1))
    assert problem.loads_are_vectors and not replace(problem, c_in=12).loads_are_vectors
    assert replace(problem, c_in=12, dtype=torch.float32).loads_are_vectors
    assert not replace(problem, c_in=64, groups=16).loads_are_vectors
