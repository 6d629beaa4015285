"""Sizes and costs of problems, by numbers worked out by hand, and problems made from arguments."""

from dataclasses import replace

import torch

from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.operators.registry import OPERATORS
from kernels.problems import ConvProblem, Projection, conv_output_size
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
    assert problem.parts == (first, ConvProblem(2, 64, 56, 56, 256, (1, 1), has_residual=True, relu=True))
    projected = replace(problem, has_residual=False, projection=Projection(64, 56, 56, (1, 1)))
    assert projected.flops == problem.flops + 2 * pixels * 256 * 64
    assert projected.activation_bytes == 2 * pixels * (64 + 64 + 256)
    assert projected.weight_bytes == problem.weight_bytes + 2 * 256 * 64


def test_costs_of_a_stem_and_a_head() -> None:
    stem = StemProblem(ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True))
    assert stem.out_shape == (8, 64, 56, 56)
    assert stem.flops == 2 * 8 * 112 * 112 * 64 * 147
    assert stem.activation_bytes == 2 * 8 * (224 * 224 * 3 + 56 * 56 * 64)
    assert stem.weight_bytes == 2 * 64 * 148
    assert StemProblem(replace(stem.conv, height=19, width=23)).out_shape == (8, 64, 5, 6)
    head = HeadProblem(32, 2048, 7, 7, 1000, torch.float32)
    assert head.out_shape == (32, 1000)
    assert head.flops == 2 * 32 * 2048 * 1000
    assert head.activation_bytes == 4 * 32 * (2048 * 49 + 1000)
    assert head.weight_bytes == 4 * 1000 * 2049


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


def test_output_size_is_torchs() -> None:
    for size, kernel, stride, padding, dilation in ((7, 3, 2, 1, 1), (8, 3, 2, 1, 1), (9, 2, 3, 0, 4), (5, 5, 1, 2, 1)):
        y = torch.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, stride, padding, dilation)
        assert conv_output_size(size, kernel, stride, padding, dilation) == y.shape[2]


def test_another_dtype_or_batch_changes_nothing_else() -> None:
    for problem in CASES.values():
        for dtype in (torch.bfloat16, torch.float32):
            changed = problem.with_dtype(dtype)
            assert changed.dtype == dtype and changed.with_dtype(problem.dtype) == problem
            assert changed.flops == problem.flops
            assert changed.activation_bytes == problem.activation_bytes * dtype.itemsize // 2
        many = problem.with_batch(3 * problem.batch)
        assert many.batch == 3 * problem.batch and many.with_batch(problem.batch) == problem
        assert many.flops == 3 * problem.flops and many.weight_bytes == problem.weight_bytes


def test_arguments_describe_their_problem() -> None:
    for problem in CASES.values():
        tensors = {name: torch.empty(s, dtype=problem.dtype, device="meta") for name, s in problem.shapes.items()}
        assert OPERATORS[problem.operator](**tensors, **problem.settings).problem() == problem
