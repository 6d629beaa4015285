"""Sizes and costs of problems, by numbers worked out by hand, and problems made from arguments."""

from dataclasses import replace

import pytest
import torch

from kernels.oracle import make_inputs, operator_call
from kernels.problems import (
    PROBLEMS,
    BottleneckProblem,
    ConvProblem,
    HeadProblem,
    Projection,
    StemProblem,
    conv_output_size,
    with_dtype,
)
from tests.kernels.cases import CASES


def test_costs_of_a_convolution() -> None:
    stem = ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3))
    assert stem.out_shape == (8, 64, 112, 112)
    assert (stem.gemm_m, stem.gemm_n, stem.gemm_k) == (100352, 64, 147)
    assert stem.flops == 2 * 100352 * 64 * 147
    assert stem.activation_bytes == 2 * 8 * (224 * 224 * 3 + 112 * 112 * 64)
    assert stem.weight_bytes == 2 * 64 * (147 + 1)
    grouped = ConvProblem(1, 128, 8, 8, 128, (3, 3), padding=(1, 1), groups=32)
    assert (grouped.c_in_per_group, grouped.gemm_n, grouped.gemm_k) == (4, 4, 36)
    assert grouped.flops == 2 * 64 * 128 * 36 and grouped.weight_bytes == 2 * 128 * 37


def test_a_strided_convolution_reads_only_the_pixels_under_its_taps() -> None:
    strided = ConvProblem(1, 256, 56, 56, 512, (1, 1), (2, 2), has_residual=True, dtype=torch.float32)
    assert strided.activation_bytes == 4 * (28 * 28 * 256 + 2 * 28 * 28 * 512)
    assert replace(strided, kernel=(3, 3), padding=(1, 1)).activation_bytes == 4 * (56 * 56 * 256 + 2 * 28 * 28 * 512)


def test_costs_of_a_projection() -> None:
    problem = ConvProblem(4, 128, 28, 28, 512, (1, 1), relu=True, projection=Projection(256, 56, 56, (2, 2)))
    assert problem.gemm_k == 128
    assert problem.flops == 2 * (4 * 28 * 28) * 512 * (128 + 256)
    assert problem.activation_bytes == 2 * 4 * 28 * 28 * (128 + 256 + 512)
    assert problem.weight_bytes == 2 * 512 * (128 + 256 + 1)


def test_costs_of_a_bottleneck() -> None:
    first = ConvProblem(2, 64, 56, 56, 64, (3, 3), padding=(1, 1), relu=True)
    problem = BottleneckProblem(first, 256, has_residual=True, relu=True)
    pixels = 2 * 56 * 56
    assert problem.out_shape == (2, 256, 56, 56)
    assert problem.flops == 2 * pixels * (64 * 576 + 256 * 64)
    assert problem.activation_bytes == 2 * pixels * (64 + 256 + 256), "what lies between is neither written nor read"
    assert problem.weight_bytes == 2 * (64 * 577 + 256 * 65)
    assert problem.second == ConvProblem(2, 64, 56, 56, 256, (1, 1), has_residual=True, relu=True)
    projected = replace(problem, has_residual=False, projection=Projection(64, 56, 56, (1, 1)))
    assert projected.flops == problem.flops + 2 * pixels * 256 * 64
    assert projected.activation_bytes == 2 * pixels * (64 + 64 + 256)
    assert projected.weight_bytes == problem.weight_bytes + 2 * 256 * 64


def test_costs_of_a_stem() -> None:
    problem = StemProblem(ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True))
    assert problem.out_shape == (8, 64, 56, 56)
    assert problem.flops == 2 * 8 * 112 * 112 * 64 * 147
    assert problem.activation_bytes == 2 * 8 * (224 * 224 * 3 + 56 * 56 * 64)
    assert problem.weight_bytes == 2 * 64 * 148
    assert StemProblem(replace(problem.conv, height=19, width=23)).out_shape == (8, 64, 5, 6)


def test_costs_of_a_head() -> None:
    problem = HeadProblem(32, 2048, 7, 7, 1000, torch.float32)
    assert problem.out_shape == (32, 1000)
    assert problem.flops == 2 * 32 * 2048 * 1000
    assert problem.activation_bytes == 4 * 32 * (2048 * 49 + 1000)
    assert problem.weight_bytes == 4 * 1000 * 2049


def test_dense_means_a_matrix_product() -> None:
    dense = ConvProblem(1, 64, 7, 7, 64, (1, 1))
    assert dense.is_dense and replace(dense, projection=Projection(32, 7, 7, (1, 1))).is_dense
    for changes in (
        {"kernel": (3, 3), "padding": (1, 1)},
        {"stride": (2, 2)},
        {"padding": (1, 1)},
        {"projection": Projection(32, 14, 14, (2, 2))},
    ):
        assert not replace(dense, **changes).is_dense


def test_loads_are_vectors_of_16_bytes() -> None:
    problem = ConvProblem(1, 8, 7, 7, 64, (1, 1))
    assert problem.loads_are_vectors and not replace(problem, c_in=12).loads_are_vectors
    assert replace(problem, c_in=12, dtype=torch.float32).loads_are_vectors
    assert not replace(problem, c_in=64, groups=16).loads_are_vectors


def test_output_size_is_torchs() -> None:
    for size, kernel, stride, padding, dilation in ((7, 3, 2, 1, 1), (8, 3, 2, 1, 1), (9, 2, 3, 0, 4), (5, 5, 1, 2, 1)):
        y = torch.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, stride, padding, dilation)
        assert conv_output_size(size, kernel, stride, padding, dilation) == y.shape[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_another_dtype_changes_nothing_else(dtype: torch.dtype) -> None:
    for problem in CASES.values():
        changed = with_dtype(problem, dtype)
        assert changed.dtype == dtype and with_dtype(changed, problem.dtype) == problem
        assert changed.flops == problem.flops
        assert changed.activation_bytes == problem.activation_bytes * dtype.itemsize // 2


@pytest.mark.parametrize("name", CASES)
def test_arguments_describe_their_problem(name: str) -> None:
    problem = CASES[name]
    operator, arguments = operator_call(problem, make_inputs(problem, "meta"))
    assert PROBLEMS[operator](*arguments) == problem
