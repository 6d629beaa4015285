"""What a network, an input or the mode of PyTorch may do to an export: right, left as it was by name, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from export import Batch, ExportConfig, ExportError, FusedProgram, export_bundle, fuse
from export.base.precision import PRECISIONS
from export.runtime.artefacts import running_first
from export.runtime.bundle.contents import open_bundle
from kernels.configs.config import MAX_PIXELS
from kernels.configs.convolution import ConvConfig
from kernels.jit.parts import _pixel_offset
from kernels.operators.conv2d_bias_act import conv2d_bias_act
from kernels.problems import ConvProblem
from tests.export import networks

BATCH = Batch(1, 2, 4)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def chain(*layers: nn.Module) -> nn.Module:
    """Layers in a row with BatchNorm that has seen something, in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def fused_equal(model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> FusedProgram:
    """The fused program, which in float64 is the eager model."""
    program = fuse(model, x, BATCH)
    with torch.no_grad():
        y, expected = program.master(x.double()), copy.deepcopy(model).double()(x.double())
    assert (y - expected).norm() <= tolerance * expected.norm()
    return program


def left(program: FusedProgram, kind: str) -> list[str]:
    return [operator.name for operator in program.coverage.left if kind in operator.kind]


def test_row_01_batchnorm_without_running_statistics_stays_eager_by_name(x: Tensor) -> None:
    model = networks.make(networks.BatchStatistics, x)
    program = fuse(model, x, Batch(4, 4, 4))
    assert [operator.name for operator in program.coverage.left if "statistics" in operator.reason] == ["bn"]
    assert "bn: " in str(program.coverage)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_row_02_batchnorm_without_affine_is_folded(x: Tensor) -> None:
    program = fused_equal(chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU()), x)
    assert [operator.parts for operator in program.coverage.fused] == [("0", "1", "2")]


def test_row_03_a_bias_before_batchnorm_is_folded(x: Tensor) -> None:
    model = chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    program = fused_equal(model, x)
    conv, bn = model
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    expected = (conv.bias.double() - bn.running_mean.double()) * scale + bn.bias.double()
    biases = [tensor for tensor in program.master.state_dict().values() if tensor.shape == (8,)]
    assert any(torch.allclose(bias, expected, rtol=1e-14, atol=0) for bias in biases)


def test_row_04_a_variance_of_0_is_folded_in_float64(x: Tensor) -> None:
    """The gain is 1 / sqrt(eps), 316: it is reported, and no reason to refuse as long as the values fit."""
    model = chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[1].running_var[3], model[1].weight[3] = 0, 1
    program = fused_equal(model, x)
    program.at(PRECISIONS["fp16"])
    note = "1: running_var is 0 in 1 of 8 channels, which are multiplied by up to 316.2"
    assert program.coverage.notes == (note,) and note in str(program.coverage)
    assert fuse(chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), x).coverage.notes == ()


class Styles(nn.Module):
    """One residual block in five styles of writing it."""

    def __init__(self, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style = style
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

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


def test_row_07_training_mode_is_refused_and_the_model_left_alone(x: Tensor, tmp_path: Path) -> None:
    model = chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    model[0].register_forward_hook(lambda *_: None)
    fuse(model, x, BATCH)
    assert not model.training and len(model[0]._forward_hooks) == 1
    assert model[0].weight.dtype == torch.float32 and model[0].weight.is_contiguous(memory_format=torch.channels_last)
    model[1].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ExportError, match=r"^expected a model in eval mode, got 1 in training mode: call \.eval\(\)$"):
        export_bundle(model, x, tmp_path / "b", ExportConfig(engine="none"))
    assert model[1].training and not model[0].training and list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_row_08_shared_convolutions_come_out_right(x: Tensor) -> None:
    program = fused_equal(networks.make(networks.SharedConv, x), x)
    assert len([op for op in program.coverage.left if "2 readers" in op.reason]) == 2


@pytest.mark.parametrize("style", ["functional", "in place", "torch.add", "swapped", "method"])
def test_row_09_every_style_is_fused_into_the_same_operator(style: str, x: Tensor) -> None:
    program = fused_equal(Styles(style).eval(), x)
    assert [operator.kind for operator in program.coverage.fused] == ["conv2d_bias_act"] and not program.coverage.left
    expected = fuse(Styles("method").eval(), x, BATCH)
    assert torch.equal(program(x), expected(x))


def test_row_10_a_parametrized_weight_is_right_and_left_parametrized(x: Tensor) -> None:
    model = chain(weight_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU())
    parameters = {name for name, _ in model.named_parameters()}
    fused_equal(model, x)
    assert {name for name, _ in model.named_parameters()} == parameters
    old_style = chain(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)))
    try:
        fused_equal(old_style, x)
    except ExportError as error:
        assert "\n" not in str(error)


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: nn.Conv2d(3, 6, 3, groups=3), ""),
    "dilation": (lambda: nn.Conv2d(3, 8, 3, dilation=2), ""),
    "dropout": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5)), ""),
    "identity": (lambda: nn.Sequential(nn.Identity(), nn.Conv2d(3, 8, 3)), ""),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), "group_norm"),
    "blur pool": (lambda: nn.Conv2d(3, 3, 3, 2, 1, groups=3, bias=False, padding_mode="reflect"), "pad"),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)), "norm"),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_row_11_what_is_not_fused_is_right_and_in_the_report(case: str, x: Tensor) -> None:
    make, kind = UNUSUAL[case]
    program = fused_equal(chain(make()), x)
    assert bool(left(program, kind)) == bool(kind) if kind else not program.coverage.left, str(program.coverage)


@pytest.mark.parametrize("network", [networks.SqueezeExcite, networks.TwoHeads], ids=lambda network: network.__name__)
def test_row_11_gates_and_heads(network: type[nn.Module], x: Tensor) -> None:
    networks.fuse_exactly(networks.make(network, x), x, BATCH)


class Shaped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 2 else x.flatten(1)


class Valued(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x


@pytest.mark.parametrize("network", [Shaped, Valued], ids=lambda network: network.__name__)
def test_row_12_branches_are_refused_in_one_line(network: type[nn.Module], x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"^torch.export cannot capture {network.__name__}: ") as error:
        export_bundle(network().eval(), x, tmp_path / "b", ExportConfig(batch=BATCH, engine="none"), images=x)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("side", range(1, 34))
def test_row_16_every_size_of_image(side: int) -> None:
    """Square where the side is odd, else as wide as 34 less the height."""
    x = torch.randn(3, 3, side, side if side % 2 else 34 - side, generator=torch.Generator().manual_seed(side))
    program = fused_equal(Small().eval(), x)
    torch.testing.assert_close(program(x), Small()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_row_16_batches_out_of_range_are_refused(size: int, bundle: Path, resnet8: nn.Module) -> None:
    program = fuse(resnet8, torch.zeros(1, 3, 16, 16), BATCH)
    with pytest.raises(ExportError, match=rf"^expected an input of shape \[1:2:4, .*\], got \[{size}, 3, 16, 16\]$"):
        program(torch.zeros(size, 3, 16, 16))
    opened = open_bundle(bundle)
    with running_first(opened) as (_, infer):
        if size:
            assert infer(np.zeros((size, 3, 16, 16), np.float32))["output"].shape == (size, 10)  # in batches
        else:
            with pytest.raises(ExportError, match="expected inputs of shape"):
                infer(np.zeros((0, 3, 16, 16), np.float32))


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
def test_row_17_inputs_of_operators_and_programs(layout: str, x: Tensor) -> None:
    """Right, or a refusal of one line; PyTorch's own operators may refuse in their own words."""
    weight = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    bias, odd = torch.randn(8), LAYOUTS[layout](x)
    program = fuse(Styles("method").eval(), x, BATCH)
    calls: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
        (
            lambda t: conv2d_bias_act(t, weight, bias, padding=(1, 1), relu=True),
            lambda t: F.relu(F.conv2d(t.double(), weight.double(), bias.double(), padding=1)),
        ),
        (program, copy.deepcopy(Styles("method").eval()).double()),
    )
    for call, expected in calls:
        before = odd.clone()
        try:
            y = call(odd)
        except (ValueError, RuntimeError, NotImplementedError):
            continue
        torch.testing.assert_close(y.double(), expected(odd.double()), rtol=2e-2, atol=2e-2)
        assert torch.equal(odd, before)


def test_row_18_ambient_modes_have_no_influence(x: Tensor) -> None:
    model = Small().eval()
    expected = fuse(model, x, BATCH)(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            got = fuse(model, x, BATCH)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected) and got.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_row_19_nan_and_inf_propagate_as_in_the_eager_model(
    value: float, bundle: Path, resnet8: nn.Module, images: Tensor
) -> None:
    poisoned = images[:4].clone()
    poisoned[2, 1, 7, 9] = value
    with torch.no_grad():
        expected = resnet8(poisoned).isfinite()
    assert expected[[0, 1, 3]].all() and not expected[2].all()
    assert torch.equal(fuse(resnet8, images, BATCH)(poisoned).isfinite(), expected)
    with running_first(open_bundle(bundle)) as (_, infer):
        assert np.array_equal(np.isfinite(infer(poisoned.numpy())["output"]), expected.numpy())


@triton.jit
def _address_kernel(n_ptr, out_ptr, H, W, CHANNELS: tl.constexpr):
    n = tl.load(n_ptr)
    tl.store(out_ptr, _pixel_offset(n, H - 1, W - 1, H, W, CHANNELS))


@pytest.mark.parametrize("n", [0, 9, 10, 2**20, 2**26])
def test_row_20_addresses_are_int64(n: int) -> None:
    """From batch 11 on, the last pixels of 224x224 images with 4096 channels are beyond 2^31 elements."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index, out = torch.tensor([n], dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int64, device=device)
    _address_kernel[(1,)](index, out, 224, 224, 4096)
    assert out.item() == ((n * 224 + 223) * 224 + 223) * 4096


def test_row_20_more_pixels_than_are_numbered_are_refused() -> None:
    config = ConvConfig(64, 64, 32, 4, 2)
    problems = [ConvProblem(n, 64, 224, 224, 64, (1, 1)) for n in (1000, MAX_PIXELS // 224**2 + 1)]
    reasons = [config.unsupported_reason(problem, None) for problem in problems]
    assert reasons[0] is None and "output pixels, expected at most 2147483647" in str(reasons[1])
