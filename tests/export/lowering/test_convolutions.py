"""What PyTorch computes on a CPU in place of a GPU."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from export.lowering.convolutions import WideConvolutions

LAYERS = {"convolution": nn.Conv2d(64, 8, 3, padding=1), "transposed": nn.ConvTranspose2d(64, 8, 4, 2)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_convolutions_of_16_bits_round_once(dtype: torch.dtype, name: str) -> None:
    layer, x = (
        copy.deepcopy(LAYERS[name]).to(dtype),
        torch.randn(2, 64, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype),
    )
    with torch.no_grad():
        expected = copy.deepcopy(layer).float()(x.float()).to(dtype)
        with WideConvolutions():
            y = layer(x)
    assert y.dtype == dtype and torch.equal(y, expected)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (5, 300), (40, 9), (5, 5), (1, 1), (2, 1)], ids=str)
def test_whole_numbers_are_convolved_exactly_in_float64_as_pytorch_lays_them_out(
    size: tuple[int, int], layout: torch.memory_format, kernel: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-8, 9, shape, generator=generator).double()
        for shape in ((3, 48, *size), (6, 48, kernel, kernel), (6,))
    )
    for stride, padding, dilation in itertools.product((1, 2), ((0, 0), (2, 1)), (1, 2)):
        for given in (None, bias) if min(size) > dilation * (kernel - 1) or kernel == 1 else ():
            expected = F.conv2d(x.to(memory_format=layout), weight, given, stride, padding, dilation)
            with WideConvolutions():
                y = F.conv2d(x.to(memory_format=layout), weight, given, stride, padding, dilation)
            assert torch.equal(y, expected) and (min(size) == 1 or y.stride() == expected.stride())


def test_other_convolutions_of_float64_are_pytorchs() -> None:
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    for layer, images in (
        (nn.Conv2d(4, 6, 3, groups=2), x),
        (nn.ConvTranspose2d(4, 6, 3), x),
        (nn.Conv2d(4, 6, 3), x[:0]),
        (nn.Conv1d(4, 6, 3), x[..., 0]),
    ):
        expected = layer.double()(images)
        with WideConvolutions():
            assert torch.equal(layer(images), expected)
