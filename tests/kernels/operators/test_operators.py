"""The operators: dispatch, fakes, export, references and their surroundings."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.operators.conv2d_bias_act import conv2d_bias_act
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem, conv2d_bias_relu_maxpool
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem, conv2d_conv1x1_bias_act
from kernels.operators.conv2d_projection_bias_act import conv2d_projection_bias_act
from kernels.operators.mean_linear import HeadProblem, mean_linear
from kernels.operators.registry import OPERATORS
from kernels.oracle import make_inputs, oracle, p1_failures
from kernels.problems import ConvProblem, Problem
from kernels.rounding import MAX_Z
from tests.kernels.cases import CASES, DTYPES, NETWORK_CASES, ONE_OF_EACH, SMALL
from tests.kernels.launching import operator, same
from tests.kernels.strategies import is_dense

# Without the convolutions of the networks, which add nothing but size.
REFERENCE_CASES = {name: p for name, p in CASES.items() if name.removeprefix("conv ") not in NETWORK_CASES}


def test_one_of_each_covers_every_operator() -> None:
    assert {problem.operator for problem in ONE_OF_EACH.values()} == OPERATORS.keys()


@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_reference_equals_the_oracle(name: str) -> None:
    """In every dtype; in float64, where it is the oracle, it is the plain composition."""
    for dtype in DTYPES.values():
        problem = REFERENCE_CASES[name].with_dtype(dtype)
        inputs = make_inputs(problem)
        given = inputs.map(Tensor.clone)
        y = inputs.reference()
        assert p1_failures(y, problem, given) == [], dtype
        assert is_dense(y)
        assert torch.equal(y, operator(inputs))
        assert same(inputs, given)
    wide = make_inputs(problem.with_dtype(torch.float64))
    _, sigma = oracle(problem.with_dtype(torch.float32), wide)  # 29 bits fewer
    difference = (operator(wide) - plain_composition(problem, wide.tensors())).abs()
    assert bool((difference <= MAX_Z[torch.float32] * 2.0**-29 * sigma).all())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_on_a_gpu_equals_the_oracle(name: str, dtype: str) -> None:
    problem = CASES[name].with_dtype(DTYPES[dtype])
    inputs = make_inputs(problem, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = operator(inputs).cpu()
    assert is_dense(y)
    assert p1_failures(y, problem, inputs) == []


def plain_composition(problem: Problem, i: dict[str, Tensor]) -> Tensor:
    """The operator in torch's own words, in the dtype of the inputs."""
    if isinstance(problem, HeadProblem):
        return F.linear(F.adaptive_avg_pool2d(i["x"], 1).flatten(1), i["weight"], i["bias"])
    assert isinstance(problem, ConvProblem | StemProblem | BottleneckProblem)
    conv = problem.convolution
    y = F.conv2d(i["x"], i["weight"], i["bias"], conv.stride, conv.padding, conv.dilation, conv.groups)
    if isinstance(problem, StemProblem):
        return F.max_pool2d(F.relu(y), 3, 2, 1)
    if isinstance(problem, BottleneckProblem):
        y = F.conv2d(F.relu(y), i["expand_weight"], i["expand_bias"])
    if problem.has_residual:
        y = y + (i["shortcut"] if isinstance(problem, BottleneckProblem) else i["residual"])
    if problem.projection:
        y = y + F.conv2d(i["shortcut"], i["shortcut_weight"], stride=problem.projection.stride)
    return F.relu(y) if problem.relu else y


_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    *(conv2d_bias_act, conv2d_bias_relu_maxpool, conv2d_conv1x1_bias_act, conv2d_projection_bias_act, mean_linear),
)
FUNCTIONS = {function.__name__: function for function in _FUNCTIONS}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_public_function_takes_hyperparameters_by_name(name: str) -> None:
    """Defaults are a stride of 1, no padding, no shortcut, no ReLU."""
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem)
    function = FUNCTIONS[problem.operator]
    defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "relu": False}
    given = {key: value for key, value in problem.settings.items() if (key, value) not in defaults.items()}
    assert torch.equal(function(*inputs.tensors().values(), **given), operator(inputs))
    assert [*inspect.signature(function).parameters] == [*OPERATORS[problem.operator].names()]


def test_defaults() -> None:
    inputs = make_inputs(replace(SMALL, padding=(0, 0), has_residual=False, relu=False))
    assert torch.equal(conv2d_bias_act(*inputs.tensors().values()), operator(inputs))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batch_0_gives_an_empty_output(name: str) -> None:
    problem = ONE_OF_EACH[name].with_batch(0)
    y = operator(make_inputs(problem))
    assert y.shape == problem.out_shape and y.shape[0] == 0 and y.dtype == problem.dtype


OPCHECKED = [*ONE_OF_EACH, "conv one-pixel-image", "conv one-channel-in-and-out", "stem one-pixel-image"]


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    inputs = make_inputs({**CASES, **ONE_OF_EACH}[name])
    torch.library.opcheck(getattr(torch.ops.resnet_deploy, inputs.operator).default, inputs.values())


class EveryOperator(nn.Module):
    """A small network of all five operators, weights as buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {
            "stem": (8, 3, 3, 3), "conv": (8, 8, 3, 3), "expand": (16, 8, 1, 1), "identity": (8, 8, 1, 1),
            "project": (16, 8, 1, 1), "back": (8, 16, 1, 1),
        }.items():  # fmt: skip
            weight = torch.randn(shape) / shape[1]
            self.register_buffer(name, weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("head", torch.randn(5, 16))
        for size in (5, 8, 16):
            self.register_buffer(f"bias_{size}", torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self  # whose buffers are tensors
        same: dict[str, Any] = {"padding": (1, 1), "relu": True}
        b8, b16 = m.bias_8, m.bias_16
        a = conv2d_bias_relu_maxpool(x, m.stem, b8, padding=(1, 1))
        b = conv2d_bias_act(a, m.conv, b8, **same)
        c = conv2d_bias_act(b, m.conv, b8, a, **same)
        d = conv2d_projection_bias_act(c, m.conv, b8, b, m.identity, **same)
        e = conv2d_conv1x1_bias_act(d, m.conv, b8, m.expand, b16, c, m.project, **same)
        f = conv2d_bias_act(e, m.back, b8, relu=True)
        g = conv2d_conv1x1_bias_act(f, m.conv, b8, m.expand, b16, e, **same)
        y: Tensor = mean_linear(g, m.head, m.bias_5)
        return y


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 9, 10).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_export_keeps_the_operators_and_the_dynamic_batch(decompose: bool) -> None:
    model = EveryOperator()
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=32)}}
    program = torch.export.export(model, (images(2),), dynamic_shapes=dynamic)
    if decompose:
        program = program.run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes]
    counts = {name: targets.count(f"resnet_deploy.{name}.default") for name in OPERATORS}
    assert counts == {**dict.fromkeys(OPERATORS, 1), "conv2d_bias_act": 3, "conv2d_conv1x1_bias_act": 2}
    (batch,) = program.range_constraints.values()
    assert (batch.lower, batch.upper) == (1, 32)
    for size in (1, 2, 3, 32):
        x = images(size)
        assert torch.equal(program.module()(x), model(x))


def test_compile_keeps_the_operators() -> None:
    model = EveryOperator()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 5):
        x = images(size)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_are_refused_and_never_wrong(name: str) -> None:
    inputs = make_inputs(ONE_OF_EACH[name].with_dtype(torch.float32))
    expected = operator(inputs)
    inputs.tensors()["weight"].requires_grad_()
    y = operator(inputs)
    assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match=inputs.operator):
        y.sum().backward()
    with torch.no_grad():
        assert not operator(inputs).requires_grad


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_surroundings_have_no_influence(name: str, dtype: str) -> None:
    problem = ONE_OF_EACH[name].with_dtype(DTYPES[dtype])
    inputs = make_inputs(problem)
    expected = operator(inputs)
    functions = (lambda: operator(inputs), inputs.reference)
    before = torch.get_default_dtype()
    for surroundings in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with surroundings:
            assert all(torch.equal(function(), expected) for function in functions)
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(function(), expected) and function().dtype == problem.dtype for function in functions)
    finally:
        torch.set_default_dtype(before)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import kernels
layout = torch.channels_last
x = torch.randn(1, 4, 5, 5).contiguous(memory_format=layout)
weight = torch.randn(4, 4, 1, 1).contiguous(memory_format=layout)
from kernels.operators.conv2d_bias_act import conv2d_bias_act
from kernels.operators.mean_linear import mean_linear
conv2d_bias_act(x, weight, torch.zeros(4))
mean_linear(x, torch.zeros(3, 4), torch.zeros(3))
assert not torch.cuda.is_initialized()
from torch._library.custom_ops import OPDEFS
plain = (None, [1, 1], [0, 0], [1, 1], 1, False)
for operator, arguments in {
    "conv2d_bias_act": (x, weight, torch.zeros(4), *plain),
    "mean_linear": (x, torch.zeros(3, 4), torch.zeros(3)),
}.items():
    try:
        OPDEFS[f"resnet_deploy::{operator}"]._backend_fns["cuda"](*arguments)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_without_triton_the_cpu_works_and_a_gpu_call_names_the_package() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True)
    for name, line in zip(("conv2d_bias_act", "mean_linear"), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{name} on a GPU needs the package triton: pip install")
