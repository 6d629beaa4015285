"""What a network or an input may be: right, left as it was by name, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch, ExportError, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.runtime.artefacts import running_first
from export.runtime.bundle.contents import open_bundle
from kernels.operators.conv2d_bias_act import conv2d_bias_act

BATCH = Batch(1, 2, 4)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def fused_equal(model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> FusedProgram:
    """The fused program, which in float64 is the eager model."""
    program = fuse(model, x, BATCH)
    with torch.no_grad():
        y, expected = program.master(x.double()), copy.deepcopy(model).double()(x.double())
    assert (y - expected).norm() <= tolerance * expected.norm()
    return program


def test_a_variance_of_0_is_folded_in_float64_and_noted(x: Tensor) -> None:
    """The gain is 1 / sqrt(eps), 316: it is reported, and no reason to refuse as long as the values fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    assert fuse(model, x).coverage.notes == ()
    model.get_buffer("1.running_mean").normal_(0, 0.5)
    model.get_buffer("1.running_var")[3] = 0
    program = fused_equal(model, x)
    program.at(PRECISIONS["fp16"])
    note = "1: running_var is 0 in 1 of 8 channels, which are multiplied by up to 316.2"
    assert program.coverage.notes == (note,) and note in str(program.coverage)


class Styles(nn.Module):
    """One residual block in five styles of writing it."""

    def __init__(self, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style = style
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.bn.get_buffer("running_mean").normal_()
        self.bn.get_buffer("running_var").uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.style == "functional":
            bn = self.bn
            return F.relu(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps) + x)
        y = self.bn(y)
        if self.style == "in place":
            y += x
            return y.relu_()
        if self.style == "torch.add":
            return torch.relu(torch.add(y, x))
        return F.relu(x + y) if self.style == "swapped" else F.relu(y.add(x))


@pytest.fixture(scope="module")
def block(x: Tensor) -> FusedProgram:
    return fuse(Styles("method").eval(), x, BATCH)


@pytest.mark.parametrize("style", ["functional", "in place", "torch.add", "swapped"])
def test_every_style_is_fused_into_the_same_operator(style: str, x: Tensor, block: FusedProgram) -> None:
    program = fused_equal(Styles(style).eval(), x)
    assert [operator.kind for operator in program.coverage.fused] == ["conv2d_bias_act"] and not program.coverage.left
    assert torch.equal(program(x), block(x))


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "blur pool": (lambda: nn.Conv2d(3, 3, 3, 2, 1, groups=3, bias=False, padding_mode="reflect"), "pad"),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)), "norm"),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_not_fused_is_right_and_in_the_report(case: str, x: Tensor) -> None:
    make, kind = UNUSUAL[case]
    program = fused_equal(make().eval(), x)
    assert [operator for operator in program.coverage.left if kind in operator.kind], str(program.coverage)


def test_weight_normalisation_of_old_is_refused_in_one_line(x: Tensor) -> None:
    with pytest.raises(ExportError, match="the model cannot be copied: ") as error:
        fuse(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)).eval(), x, BATCH)
    assert "\n" not in str(error.value)


class Shaped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 2 else x.flatten(1)


def test_a_branch_on_the_size_of_the_batch_is_refused_in_one_line(x: Tensor) -> None:
    with pytest.raises(ExportError, match=r"^torch\.export cannot capture Shaped: ") as error:
        fuse(Shaped().eval(), x, BATCH)
    assert "\n" not in str(error.value)


class Small(nn.Module):
    """A stem with its pool, a strided block with a projection, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.pool = nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.project, self.fc = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x) + self.project(x)).mean((2, 3)))


@pytest.mark.parametrize("side", range(1, 18))
def test_every_size_of_image(side: int) -> None:
    """Each of 1 to 33 pixels is the height or the width of one, residues of all strides in both."""
    height, width = (side, 34 - side) if side % 2 else (34 - side, side)
    x = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(side))
    model = Small().eval()
    torch.testing.assert_close(fused_equal(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
    "channel slice": lambda x: torch.cat([x, x], 1)[:, :3],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "float16": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "float64": Tensor.double,
    "uint8": lambda x: (x * 50 + 128).clamp(0, 255).to(torch.uint8),
    "int64": Tensor.long,
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x > 0,
    "meta": lambda x: x.to("meta"),
    "sparse": Tensor.to_sparse,
    "3 dimensions": lambda x: x[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_operators_and_programs(layout: str, x: Tensor, block: FusedProgram) -> None:
    """Right, or a refusal; PyTorch's own operators may refuse in their own words."""
    weight = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    bias, odd = torch.randn(8), LAYOUTS[layout](x)
    calls: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
        (
            lambda t: conv2d_bias_act(t, weight, bias, padding=(1, 1), relu=True),
            lambda t: F.relu(F.conv2d(t.double(), weight.double(), bias.double(), padding=1)),
        ),
        (block, Styles("method").eval().double()),
    )
    for call, expected in calls:
        before = odd.clone()
        try:
            y = call(odd)
        except (ValueError, RuntimeError, NotImplementedError):
            continue
        torch.testing.assert_close(y.double(), expected(odd.double()), rtol=2e-2, atol=2e-2)
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
