"""What PyTorch computes on a CPU in place of a GPU."""

import copy

import pytest
import torch
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
