"""The gate on the gate, for activations and folds: each made wrong on purpose and refused, and right and accepted."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from export import FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.operators import check_operators
from export.fusion.nodes import resnet_deploy
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.runtime.runner import Runner
from export.sample_inputs import crops, photographs
from kernels.operators.activations import ACTIVATIONS
from tests.conftest import Made
from tests.export.criteria.mutants import Arguments, Defect, Mutant, changing, correct
from tests.export.networks import BATCH, Called, make
from tests.export.onnx_edits import Edit, change, edited

CONV = resnet_deploy.conv2d_bias_act.default
MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu6": nn.ReLU6, "leaky_relu": lambda: nn.LeakyReLU(0.1), "prelu": lambda: nn.PReLU(8), "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU, "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Tensor:
    return crops(photographs(), 8, 3, (32, 32), seed=5)


def network(name: str, images: Tensor) -> nn.Module:
    """A convolution and a sum, each with the activation; values reach beyond every bend."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = m.first_act(m.first(x))
        return m.second_act(m.second(x) + x)

    def conv(c: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))

    def build() -> nn.Module:
        return Called(call, first=conv(3), first_act=MODULES[name](), second=conv(8), second_act=MODULES[name]())

    model = make(build, images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data *= 2.5
        if isinstance(module, nn.PReLU):
            module.weight.data.uniform_(-0.4, 0.8)
    return model


@pytest.fixture(scope="module")
def programs(images: Tensor) -> Mapping[str, FusedProgram]:
    return Made(lambda name: fuse(network(name, images), images, BATCH))


def traced(runner: Runner, images: Tensor) -> dict[str, Tensor]:
    with runner:
        return dict(runner.trace({"input": images.numpy()}))


def accepts(program: FusedProgram, runner: Runner, images: Tensor, precision: str) -> bool:
    trace = traced(runner, images)
    return bool(check_operators(program, PRECISIONS[precision], trace, runner.name == "onnx"))


def runner_of(program: FusedProgram, precision: str, operators: dict[Any, Any] | None = None) -> ProgramRunner:
    return ProgramRunner(program, PRECISIONS[precision], ("output",), operators=operators or {})


def instead(**changes: Any) -> Defect:
    return lambda a: correct(CONV, a, **changes)


def of_values(function: Callable[[Tensor], Tensor]) -> Defect:
    """Another function of what the activation reads, computed as the right one is."""

    def defect(a: Arguments) -> Tensor:
        wide = {name: value.double() for name, value in vars(a).items() if isinstance(value, Tensor)}
        pre = correct(CONV, Arguments(**vars(a) | wide), activation="", slope=None)
        return function(pre).to(a.x.dtype).contiguous(memory_format=torch.channels_last)

    return defect


def before_the_addition(a: Arguments) -> Tensor:
    y = correct(CONV, a, residual=None)
    return (y + a.residual).contiguous(memory_format=torch.channels_last)


def quick_gelu(v: Tensor) -> Tensor:
    return v * torch.sigmoid(1.702 * v)


Planted = Defect | tuple[Defect, Callable[[Arguments], bool]]
EVERY: dict[str, Planted] = {
    "dropped": instead(activation="", slope=None),
    "ReLU": instead(activation="", relu=True, slope=None),
    "before the addition": (before_the_addition, lambda a: a.residual is not None),
}
OWN: dict[str, dict[str, Planted]] = {
    "relu6": {
        "clip at 5.9": of_values(lambda v: v.clamp(0, 5.9)), "clip from -0.1": of_values(lambda v: v.clamp(-0.1, 6)),
    },
    "leaky_relu": {
        "the default slope": instead(negative_slope=0.01),
        "a slope of 0.11": instead(negative_slope=0.11),
        "slope of the positive": of_values(lambda v: torch.where(v > 0, 0.1 * v, v)),
    },
    "prelu": {
        "channels swapped": changing(CONV, "slope", lambda s: s[[1, 0, *range(2, len(s))]]),
        "one slope for all": changing(CONV, "slope", lambda s: s[:1].expand(len(s)).contiguous()),
        "slope's sign": changing(CONV, "slope", torch.neg),
    },
    "sigmoid": {"hardsigmoid": instead(activation="hardsigmoid")},
    "silu": {"sigmoid alone": instead(activation="sigmoid"), "hardswish": instead(activation="hardswish"),
             "GELU's": of_values(quick_gelu)},
    "hardsigmoid": {
        "sigmoid": instead(activation="sigmoid"), "slope of a fifth": of_values(lambda v: (v / 5 + 0.5).clamp(0, 1)),
    },
    "hardswish": {"silu": instead(activation="silu"), "not divided": of_values(lambda v: v * (v + 3).clamp(0, 6)),
                  "shift of 2.9": of_values(lambda v: v * (v + 2.9).clamp(0, 6) / 6)},
    "gelu": {"tanh for erf": instead(activation="gelu_tanh"), "quick": of_values(quick_gelu)},
    "gelu_tanh": {"erf for tanh": instead(activation="gelu"), "quick": of_values(quick_gelu)},
}  # fmt: skip
DEFECTS = [(name, defect) for name in ACTIVATIONS for defect in {**EVERY, **OWN[name]}]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_right_activation_is_accepted(
    name: str, programs: Mapping[str, FusedProgram], images: Tensor, precision: str
) -> None:
    assert accepts(programs[name], runner_of(programs[name], precision), images, precision)


@pytest.mark.mutant
@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_a_wrong_activation_is_refused(
    name: str, defect: str, programs: Mapping[str, FusedProgram], images: Tensor, precision: str
) -> None:
    planted = {**EVERY, **OWN[name]}[defect]
    mutant = Mutant(CONV, *(planted if isinstance(planted, tuple) else (planted,)))
    program = programs[name]
    assert not accepts(program, runner_of(program, precision, mutant.operators(program)), images, precision)


def _attribute(op_type: str, **values: float) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == op_type][-1]
        for attribute in node.attribute:
            attribute.f = values.get(attribute.name, attribute.f)

    return edit


def _input(op_type: str, index: int, changed: Callable[[NDArray], NDArray]) -> Edit:
    """The constant that the last node of a type reads."""

    def edit(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == op_type][-1]
        change(model, node.input[index], changed)

    return edit


IN_FILES: dict[str, tuple[str, Edit]] = {
    "clip at 5.9": ("relu6", _input("Clip", 2, lambda limit: limit * 0 + 5.9)),
    "the default slope": ("leaky_relu", _attribute("LeakyRelu", alpha=0.01)),
    "slopes swapped": ("prelu", _input("PRelu", 1, lambda slopes: slopes[::-1])),
    "ONNX's own slope of Hardsigmoid": ("hardswish", _attribute("HardSigmoid", alpha=0.2)),
}


@pytest.mark.mutant
@pytest.mark.parametrize("defect", IN_FILES)
@pytest.mark.parametrize("form", ["fp32", "fp16"])
def test_a_wrong_activation_in_a_file_is_refused(
    defect: str, form: str, programs: Mapping[str, FusedProgram], images: Tensor
) -> None:
    name, edit = IN_FILES[defect]
    file = lower_onnx(programs[name], PRECISIONS[form], {})
    right = TracedOnnxRunner(file, PRECISIONS[form])
    assert accepts(programs[name], right, images, form)
    broken = replace(file, model=edited(file.model, edit))
    assert not accepts(programs[name], TracedOnnxRunner(broken, PRECISIONS[form]), images, form)


class Folds(nn.Module):
    """One of everything that folds, in one network. What may be wrong about a fold is an attribute of it."""

    def __init__(self) -> None:
        super().__init__()
        self.standardised = nn.Conv2d(3, 8, 3, padding=1)
        self.unbiased = False
        self.frozen = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.eps = 1e-5
        for name in ("gain", "offset", "mean", "var"):
            self.register_buffer(name, torch.rand(8) * 0.03 + 0.01 if name == "var" else torch.rand(8) + 0.3)
        self.dense, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
        self.before, self.behind = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.padded_before, self.padded = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 8, 2, 2, groups=2, bias=False), nn.BatchNorm2d(8)
        self.last, self.last_norm = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)
        self.turned = False

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        var, mean = torch.var_mean(m.standardised.weight, [1, 2, 3], keepdim=True, unbiased=m.unbiased)
        weight = (m.standardised.weight - mean) / torch.sqrt(var + 1e-10)
        x = F.relu(0.2 * F.conv2d(x, weight, m.standardised.bias, padding=1))
        scale = (m.gain * (m.var + m.eps).rsqrt()).reshape(1, -1, 1, 1) * 0.1
        x = F.relu(m.frozen(x) * scale + (m.offset - m.mean).reshape(1, -1, 1, 1))
        x = F.relu(m.norms[0](m.dense(x)) + m.norms[1](m.pointwise(x)) + m.norms[2](x))
        x = F.relu(m.behind(m.before(x)))
        x = m.padded(m.padded_before(x))
        x = F.relu((x - 0.4) if m.turned else (0.4 - x))
        x = F.relu(m.up_norm(m.up(x)))
        y: Tensor = m.last_norm(m.last(x.mean((2, 3))))
        return y


def _off_centre(m: Any) -> None:
    weight = m.pointwise.weight.data
    m.pointwise = nn.Conv2d(8, 8, 3, padding=1, bias=False).eval()
    m.pointwise.weight.data = F.pad(weight, (0, 2, 1, 1))


def _without(name: str, index: int) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        getattr(m, name)[index].weight.data.zero_()
        getattr(m, name)[index].bias.data.zero_()

    return change


def _plain(name: str) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        getattr(m, name).weight.data.fill_(1)
        getattr(m, name).bias.data.zero_()

    return change


def _set(name: str, value: object) -> Callable[[Any], None]:
    """An attribute, or an attribute of a module."""
    owner, _, attribute = name.rpartition(".")
    return lambda m: setattr(m.get_submodule(owner), attribute, value)


# What a wrong fold would make of the network, in its own words; float16 and float32 have to show it.
WRONG: dict[str, Callable[[Any], None]] = {
    "frozen eps 1e-3": _set("eps", 1e-3),
    "BatchNorm1d eps 1e-1": _set("last_norm.eps", 1e-1),
    "variance with N - 1": _set("unbiased", True),
    "identity branch dropped": _without("norms", 2),
    "1x1 branch dropped": _without("norms", 1),
    "1x1 branch off centre": _off_centre,
    "shift dropped": lambda m: m.offset.copy_(m.mean),
    "x - c for c - x": _set("turned", True),
    "BatchNorm before dropped": _plain("before"),
    "transposed scale reversed": lambda m: m.up_norm.weight.data.copy_(m.up_norm.weight.data.flip(0)),
}
# Functions of the pass made wrong: what it asks, and along which axis it scales.
PATCHED: dict[str, tuple[str, Callable[..., Any]]] = {
    "padding sees the shift": ("_pads", lambda graph_module, layer: False),
    "output scaled along the input": (
        "_output_scaled", lambda layer, weight, scale: weight * scale.reshape(-1, *[1] * (weight.dim() - 2))
        if weight.shape[1] == len(scale) else weight * scale.reshape(-1, *[1] * (weight.dim() - 1)),
    ),
    "input scaled along the output": (
        "_by_input", lambda layer, weight, scale: weight * scale.reshape(-1, *[1] * (weight.dim() - 1)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folds(images: Tensor) -> tuple[nn.Module, FusedProgram]:
    model = make(Folds, images)
    return model, fuse(model, images, BATCH)


def test_right_folds_are_accepted(folds: tuple[nn.Module, FusedProgram], images: Tensor, precision: str) -> None:
    assert accepts(folds[1], runner_of(folds[1], precision), images, precision)


@pytest.fixture(scope="module")
def broken(folds: tuple[nn.Module, FusedProgram], images: Tensor) -> Mapping[str, FusedProgram]:
    """What a defect makes of the network, to be checked against the right one."""
    model, right = folds

    def fused(defect: str) -> FusedProgram:
        changed: Any = copy.deepcopy(model)
        with pytest.MonkeyPatch.context() as patch:
            if defect in PATCHED:
                # the name in the package is the function
                patch.setattr(sys.modules["export.fusion.passes.fold_batchnorm"], *PATCHED[defect])
            else:
                with torch.no_grad():
                    WRONG[defect](changed)
            made = fuse(changed, images, BATCH)
        return FusedProgram(right.source, made.folded, made.master, BATCH)

    return Made(fused)


@pytest.mark.mutant
@pytest.mark.parametrize("defect", [*WRONG, *PATCHED])
def test_a_wrong_fold_is_refused(
    defect: str, broken: Mapping[str, FusedProgram], images: Tensor, precision: str
) -> None:
    program = broken[defect]
    trace = traced(runner_of(program, precision), images)
    refused = check_operators(program, PRECISIONS[precision], trace)
    assert not refused and not any("wiring" in check.reason for check in refused.checks)
