"""What a network or an input may be: right, left as it was by name, or refused."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.runtime.artefacts import running_first
from export.runtime.bundle.contents import open_bundle
from tests.export.networks import BATCH, Called, fuse_exactly


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_variance_of_0_is_folded_in_float64_and_noted(x: Tensor) -> None:
    """The gain is 1 / sqrt(eps), 316: it is reported, and no reason to refuse as long as the values fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    assert fuse(model, x).coverage.notes == ()
    model.get_buffer("1.running_mean").normal_(0, 0.5)
    model.get_buffer("1.running_var")[3] = 0
    program = fuse_exactly(model, x)
    program.at(PRECISIONS["fp16"])
    note = "1: running_var is 0 in 1 of 8 channels, which are multiplied by up to 316.2"
    assert program.coverage.notes == (note,) and note in str(program.coverage)


def residual() -> nn.Module:
    """A residual block in place, its shortcut on the left; more styles are in tests/export/networks.py."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.get_buffer("running_mean").normal_()
    norm.get_buffer("running_var").uniform_(0.5, 2)
    return Called(lambda x, m: (x + m.bn(m.conv(x))).relu_(), conv=nn.Conv2d(3, 3, 3, padding=1), bn=norm).eval()


@pytest.fixture(scope="module")
def block(x: Tensor) -> FusedProgram:
    program = fuse_exactly(residual(), x)
    assert [operator.kind for operator in program.coverage.fused] == ["conv2d_bias_act"] and not program.coverage.left
    return program


def small(x: Tensor, m: Any) -> Tensor:
    """A stem with its pool, a strided block with a projection, and a head."""
    x = F.max_pool2d(F.relu(m.conv1(x)), 3, 2, 1)
    return m.fc(F.relu(m.conv2(x) + m.project(x)).mean((2, 3)))


@pytest.mark.parametrize("side", range(1, 18))
def test_every_size_of_image(side: int) -> None:
    """Each of 1 to 33 pixels is the height or the width of one, residues of all strides in both."""
    height, width = (side, 34 - side) if side % 2 else (34 - side, side)
    x = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(side))
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 7, 2, 3), nn.Conv2d(8, 8, 3, 2, 1)
    model = Called(small, conv1=first, conv2=second, project=nn.Conv2d(8, 8, 1, 2), fc=nn.Linear(8, 4)).eval()
    torch.testing.assert_close(fuse_exactly(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.complex64)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
    "channel slice": lambda x: torch.cat([x, x], 1)[:, :3],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "uint8": lambda x: (x * 50 + 128).clamp(0, 255).to(torch.uint8),
    **{str(dtype): methodcaller("to", dtype) for dtype in DTYPES},
    "bool": lambda x: x > 0,
    "meta": lambda x: x.to("meta"),
    "sparse": Tensor.to_sparse,
    "3 dimensions": lambda x: x[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_programs(layout: str, x: Tensor, block: FusedProgram) -> None:
    """Right, or a refusal; PyTorch's own operators may refuse in their own words. The fused ones draw theirs."""
    odd = LAYOUTS[layout](x)
    before = odd.clone()
    try:
        y = block(odd)
    except (ValueError, RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(y.double(), residual().double()(odd.double()), rtol=2e-2, atol=2e-2)
    assert torch.equal(odd, before)


def test_nan_and_inf_propagate_as_in_the_eager_model(bundle: Path, resnet8: nn.Module, images: Tensor) -> None:
    program = fuse(resnet8, images, BATCH)
    with running_first(open_bundle(bundle)) as (_, infer):
        for value in (float("nan"), float("inf"), float("-inf")):
            poisoned = images[:4].clone()
            poisoned[2, 1, 7, 9] = value
            with torch.no_grad():
                expected = resnet8(poisoned).isfinite()
            assert expected[[0, 1, 3]].all() and not expected[2].all()
            assert torch.equal(program(poisoned).isfinite(), expected)
            assert np.array_equal(np.isfinite(infer(poisoned.numpy())["output"]), expected.numpy())
