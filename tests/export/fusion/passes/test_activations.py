"""Which activations become part of the convolution before them, in whatever words, and what each is in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.base.precision import PRECISIONS
from export.fusion.nodes import FUSED_OPERATORS, is_call, named_args
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.runtime.parity.checks import OperatorCheck
from tests.export.networks import BATCH, Called, Fused, fuse_exactly, judged, kinds, make

CONV, PROJECTION, HEAD = "conv2d_bias_act", "conv2d_projection_bias_act", "mean_linear"


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def spelled(call: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Called(lambda x, m: call(x))


def prelu(channels: int) -> Callable[[], nn.Module]:
    def module() -> nn.Module:
        found = nn.PReLU(channels)
        nn.init.uniform_(found.weight, -0.3, 0.7)
        return found

    return module


def residual_network(act: Callable[[], nn.Module]) -> nn.Module:
    """The activation behind a convolution, behind an identity's addition and behind a projection's."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = m.acts[0](m.stem(x))
        x = m.acts[2](m.second(m.acts[1](m.first(x))) + x)
        return m.fc(m.acts[4](m.fourth(m.acts[3](m.third(x))) + m.project(x)).mean((2, 3)))

    def conv(c: int, stride: int = 1, size: int = 3) -> nn.Module:
        return nn.Sequential(nn.Conv2d(c, 8, size, stride, size // 2, bias=False), nn.BatchNorm2d(8))

    parts = {"stem": conv(3), "first": conv(8), "second": conv(8), "third": conv(8, 2), "fourth": conv(8)}
    acts = nn.ModuleList([act() for _ in range(5)])
    return Called(call, **parts, project=conv(8, 2, 1), acts=acts, fc=nn.Linear(8, 5))


# In the words of a network -> the operator's.
WORDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ReLU6": (nn.ReLU6, "relu6"),
    "relu6 in place": (lambda: nn.ReLU6(inplace=True), "relu6"),
    "F.relu6": (spelled(F.relu6), "relu6"),
    "clamp to 6": (spelled(lambda x: torch.clamp(x, 0, 6)), "relu6"),
    "clamp": (spelled(lambda x: x.clamp(min=0)), "relu"),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.1), "leaky_relu"),
    "PReLU": (prelu(8), "prelu"),
    "PReLU of one": (prelu(1), "prelu"),
    "Sigmoid": (nn.Sigmoid, "sigmoid"),
    "SiLU": (nn.SiLU, "silu"),
    "swish": (spelled(lambda x: x * torch.sigmoid(x)), "silu"),
    "swish in place": (spelled(lambda x: x.mul_(x.sigmoid())), "silu"),
    "Hardsigmoid": (nn.Hardsigmoid, "hardsigmoid"),
    "h-sigmoid": (spelled(lambda x: F.relu6(x + 3.0) / 6.0), "hardsigmoid"),
    "Hardswish": (nn.Hardswish, "hardswish"),
    "h-swish": (spelled(lambda x: x * F.relu6(x + 3, inplace=True) / 6), "hardswish"),
    "h-swish by h-sigmoid": (spelled(lambda x: F.hardsigmoid(x) * x), "hardswish"),
    "h-swish by sixths": (spelled(lambda x: x * (F.relu6(3 + x) * (1 / 6))), "hardswish"),
    "GELU": (nn.GELU, "gelu"),
    "GELU by tanh": (lambda: nn.GELU("tanh"), "gelu_tanh"),
}
NODES = {
    "relu": ["Relu"], "relu6": ["Clip"], "leaky_relu": ["LeakyRelu"], "prelu": ["PRelu"], "sigmoid": ["Sigmoid"],
    "silu": ["Sigmoid", "Mul"], "hardsigmoid": ["HardSigmoid"], "hardswish": ["HardSigmoid", "Mul"],
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_an_activation_joins_the_convolution_before_it(word: str, images: Tensor) -> None:
    module, name = WORDS[word]
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), module(), nn.AdaptiveAvgPool2d(1)), images)
    program = fuse_exactly(model, images)
    assert kinds(program) == [CONV, "mean"], str(program.coverage)
    (call,) = [named_args(n) for n in program.master.graph.nodes if is_call(n, *FUSED_OPERATORS)]
    assert ("relu" if call["relu"] else call["activation"]) == name


# The precisions in which each is tried: float16 rounds what others hide, and has steps that others have not.
TRIED = {
    **dict.fromkeys(("ReLU6", "LeakyReLU", "Sigmoid", "Hardsigmoid", "GELU by tanh"), ("fp16",)),
    **dict.fromkeys(("PReLU", "SiLU", "Hardswish", "GELU"), ("fp32", "fp16", "bf16")),
}


@pytest.mark.parametrize("word", TRIED)
def test_a_network_of_them_is_right_in_every_form(word: str, images: Tensor) -> None:
    network = Fused(make(lambda: residual_network(WORDS[word][0]), images), images)
    program = network.program
    assert kinds(program) == [CONV] * 4 + [PROJECTION, HEAD], str(program.coverage)
    for precision in TRIED[word]:
        p = PRECISIONS[precision]
        file = lower_onnx(program, p, {})
        for runner in (ProgramRunner(program, p, ("output",)), TracedOnnxRunner(file, p)):
            rung = judged(runner, network, program, precision)
            assert rung, (precision, runner.name, rung.verdict)
            assert rung.operators is not None
            checks = [check for check in rung.operators.checks if isinstance(check, OperatorCheck)]
            assert len(checks) == 6 and (precision == "fp32" or all(check.rms_z > 0.4 for check in checks))
    types = [node.op_type for node in file.model.graph.node if node.op_type != "Cast"]
    expected = NODES.get(WORDS[word][1], ["Mul"])
    assert types[1 : 1 + len(expected)] == expected and types.count(expected[0]) >= 5


LEFT: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "read twice": (spelled(lambda x: F.silu(x) + x), [CONV, "silu", "add"]),
    "no epilogue has it": (nn.ELU, [CONV, "elu"]),
    "clamped elsewhere": (lambda: nn.Hardtanh(-1, 1), [CONV, "hardtanh"]),
    "a bottleneck of SiLU": (lambda: nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 1)), [CONV, CONV]),
    "SiLU behind a bottleneck": (lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU()), [CONV, CONV]),
    "a stem of SiLU": (lambda: nn.Sequential(nn.SiLU(), nn.MaxPool2d(3, 2, 1)), [CONV, "max_pool2d"]),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_no_epilogue_is_stays(name: str, images: Tensor) -> None:
    behind, expected = LEFT[name]
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), behind(), nn.AdaptiveAvgPool2d(1)), images)
    assert kinds(fuse_exactly(model, images)) == [*expected, "mean"]


def channel_gate() -> nn.Module:
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())
    return Called(lambda x, m: x * m.squeeze(x), squeeze=squeeze)


def efficient_gate() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        y = m.conv(x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2))
        return x * y.transpose(-1, -2).unsqueeze(-1).sigmoid().expand_as(x)

    return Called(call, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False))


def convolutional_gate() -> nn.Module:
    def call(x: Tensor, m: Any) -> Tensor:
        x = x * torch.sigmoid(m.mlp(F.adaptive_avg_pool2d(x, 1)) + m.mlp(F.adaptive_max_pool2d(x, 1)))
        return x * torch.sigmoid(m.spatial(torch.cat([x.mean(1, True), x.amax(1, True)], 1)))

    mlp = nn.Sequential(nn.Conv2d(8, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 8, 1, bias=False))
    return Called(call, mlp=mlp, spatial=nn.Conv2d(2, 1, 7, padding=3, bias=False))


GATES = {
    "se": (channel_gate, ["channel"]),
    "eca": (efficient_gate, []),
    "cbam": (convolutional_gate, ["channel", "pixel"]),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_stay_by_name(name: str, images: Tensor) -> None:
    gate, factors = GATES[name]
    parts = {"conv": nn.Conv2d(3, 8, 3), name: gate(), "pool": nn.AdaptiveAvgPool2d(1)}
    model = make(lambda: Called(lambda x, m: m.pool(getattr(m, name)(F.relu(m.conv(x)))), **parts), images)
    left = [operator for operator in fuse_exactly(model, images, BATCH).coverage.left if operator.kind == "mul"]
    assert [operator.name for operator in left] == [name] * max(1, len(factors))
    reasons = [f"a gate: one factor per {what}, computed from the input" for what in factors]
    assert [operator.reason for operator in left] == (reasons or [""])
