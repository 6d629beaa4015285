"""The operators: dispatch, fakes, export, references and their surroundings."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import (
    conv2d_bias_act,
    conv2d_bias_relu_maxpool,
    conv2d_conv1x1_bias_act,
    conv2d_projection_bias_act,
    mean_linear,
)
from kernels.oracle import Inputs, make_inputs, operator_call, p1_failures
from kernels.problems import Problem, with_dtype
from tests.kernels.cases import CASES, DTYPES, ODD_CASES, ONE_OF_EACH, SMALL

OPERATORS = (
    "conv2d_bias_act",
    "conv2d_projection_bias_act",
    "conv2d_conv1x1_bias_act",
    "conv2d_bias_relu_maxpool",
    "mean_linear",
)
# Without the convolutions of the networks, which add nothing but size.
REFERENCE_CASES = {
    name: problem
    for name, problem in CASES.items()
    if not name.startswith("conv ") or name.removeprefix("conv ") in ODD_CASES
}


def run(problem: Problem, inputs: Inputs) -> Tensor:
    name, arguments = operator_call(problem, inputs)
    return getattr(torch.ops.resnet_deploy, name)(*arguments)


def reference(problem: Problem, inputs: Inputs) -> Tensor:
    name, arguments = operator_call(problem, inputs)
    return getattr(kernels, f"{name}_reference")(*arguments)


def is_dense(y: Tensor) -> bool:
    return y.is_contiguous(memory_format=torch.channels_last if y.ndim == 4 else torch.contiguous_format)


def test_one_of_each_covers_every_operator() -> None:
    called = [operator_call(problem, make_inputs(problem))[0] for problem in ONE_OF_EACH.values()]
    assert {*called} == {*OPERATORS}


@pytest.mark.parametrize("name", REFERENCE_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_the_oracle(name: str, dtype: str) -> None:
    problem = with_dtype(REFERENCE_CASES[name], DTYPES[dtype])
    inputs = make_inputs(problem)
    given = inputs.clone()
    y = reference(problem, inputs)
    assert p1_failures(y, problem, given) == []
    assert is_dense(y)
    assert torch.equal(y, run(problem, inputs))
    assert inputs.equal(given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_on_a_gpu_equals_the_oracle(name: str, dtype: str) -> None:
    problem = with_dtype(CASES[name], DTYPES[dtype])
    inputs = make_inputs(problem, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = run(problem, inputs).cpu()
    assert is_dense(y)
    assert p1_failures(y, problem, inputs) == []


def plain_composition(problem: Problem, inputs: Inputs) -> Tensor:
    """The operator in torch's own words, in the dtype of the inputs."""
    i, (name, arguments) = inputs, operator_call(problem, inputs)
    if name == "mean_linear":
        return F.linear(F.adaptive_avg_pool2d(i.x, 1).flatten(1), i.weight, i.bias)
    if name == "conv2d_bias_relu_maxpool":
        return F.max_pool2d(F.relu(F.conv2d(i.x, i.weight, i.bias, *arguments[3:])), 3, 2, 1)
    conv = problem.first if name == "conv2d_conv1x1_bias_act" else problem
    y = F.conv2d(i.x, i.weight, i.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if name == "conv2d_conv1x1_bias_act":
        y = F.conv2d(F.relu(y), i.expand_weight, i.expand_bias)
    if i.residual is not None:
        y = y + i.residual
    if i.shortcut is not None:
        y = y + F.conv2d(i.shortcut, i.shortcut_weight, stride=problem.projection.stride)
    return F.relu(y) if problem.relu else y


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "linear", "plain", "groups"])
def test_reference_in_float64_is_the_plain_composition(name: str) -> None:
    others = {
        "linear": replace(SMALL, relu=False),
        "plain": replace(SMALL, has_residual=False),
        "groups": replace(SMALL, stride=(2, 1), groups=4),
    }
    problem = with_dtype({**ONE_OF_EACH, **others}[name], torch.float64)
    inputs = make_inputs(problem)
    torch.testing.assert_close(run(problem, inputs), plain_composition(problem, inputs), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_public_function_takes_hyperparameters_by_name(name: str) -> None:
    """Defaults are a stride of 1, no padding, no shortcut, no ReLU."""
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem)
    i = inputs
    calls: dict[str, Callable[[], Tensor]] = {
        "conv": lambda: conv2d_bias_act(i.x, i.weight, i.bias, i.residual, padding=(1, 1), relu=True),
        "projection": lambda: conv2d_projection_bias_act(
            i.x, i.weight, i.bias, i.shortcut, i.shortcut_weight, padding=(1, 1), shortcut_stride=(2, 2), relu=True
        ),
        "bottleneck-residual": lambda: conv2d_conv1x1_bias_act(
            i.x, i.weight, i.bias, i.expand_weight, i.expand_bias, i.residual, padding=(1, 1), relu=True
        ),
        "bottleneck-projection": lambda: conv2d_conv1x1_bias_act(
            i.x, i.weight, i.bias, i.expand_weight, i.expand_bias, i.shortcut, i.shortcut_weight,
            padding=(1, 1), shortcut_stride=(2, 2), relu=True,
        ),
        "bottleneck-no-shortcut": lambda: conv2d_conv1x1_bias_act(
            i.x, i.weight, i.bias, i.expand_weight, i.expand_bias, padding=(1, 1), relu=True
        ),
        "stem": lambda: conv2d_bias_relu_maxpool(i.x, i.weight, i.bias, stride=(2, 2), padding=(3, 3)),
        "head": lambda: mean_linear(i.x, i.weight, i.bias),
    }  # fmt: skip
    assert torch.equal(calls[name](), run(problem, inputs))


def test_defaults() -> None:
    problem = replace(SMALL, padding=(0, 0), has_residual=False, relu=False)
    inputs = make_inputs(problem)
    assert torch.equal(conv2d_bias_act(inputs.x, inputs.weight, inputs.bias), run(problem, inputs))


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    activations = {"x", "residual", "shortcut"} & inputs.named().keys()
    return replace(inputs, **{name: inputs.named()[name][:batch] for name in activations})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batch_0_gives_an_empty_output(name: str) -> None:
    problem = ONE_OF_EACH[name]
    y = run(problem, with_batch(make_inputs(problem), 0))
    assert y.shape == (0, *problem.out_shape[1:]) and y.dtype == problem.dtype


OPCHECKED = [*ONE_OF_EACH, "conv one-pixel-image", "conv one-channel-in-and-out", "conv c_in-5", "stem one-pixel-image"]


@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    problem = with_dtype({**CASES, **ONE_OF_EACH}[name], dtype)
    operator, arguments = operator_call(problem, make_inputs(problem))
    torch.library.opcheck(getattr(torch.ops.resnet_deploy, operator).default, arguments)


@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_the_fake_output_is_shaped_and_laid_out_like_the_real_one(name: str) -> None:
    problem = REFERENCE_CASES[name]
    operator, arguments = operator_call(problem, make_inputs(problem))
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments]
        fake = getattr(torch.ops.resnet_deploy, operator)(*faked)
    assert tuple(fake.shape) == problem.out_shape and fake.dtype == problem.dtype
    assert is_dense(fake)


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
        b8, b16, same = self.bias_8, self.bias_16, {"padding": (1, 1), "relu": True}
        a = conv2d_bias_relu_maxpool(x, self.stem, b8, padding=(1, 1))
        b = conv2d_bias_act(a, self.conv, b8, **same)
        c = conv2d_bias_act(b, self.conv, b8, a, **same)
        d = conv2d_projection_bias_act(c, self.conv, b8, b, self.identity, **same)
        e = conv2d_conv1x1_bias_act(d, self.conv, b8, self.expand, b16, c, self.project, **same)
        f = conv2d_bias_act(e, self.back, b8, relu=True)
        g = conv2d_conv1x1_bias_act(f, self.conv, b8, self.expand, b16, e, **same)
        return mean_linear(g, self.head, self.bias_5)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 9, 10).contiguous(memory_format=torch.channels_last)


def operators_in(program: torch.export.ExportedProgram) -> list[Any]:
    return sorted(str(node.target) for node in program.graph.nodes if "resnet_deploy" in str(node.target))


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_export_keeps_the_operators_and_the_dynamic_batch(decompose: bool) -> None:
    model = EveryOperator()
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=32)}}
    program = torch.export.export(model, (images(2),), dynamic_shapes=dynamic)
    if decompose:
        program = program.run_decompositions()
    counts = {operator: operators_in(program).count(f"resnet_deploy.{operator}.default") for operator in OPERATORS}
    assert [*counts.values()] == [3, 1, 2, 1, 1]
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
    problem = with_dtype(ONE_OF_EACH[name], torch.float32)
    inputs = make_inputs(problem)
    expected = run(problem, inputs)
    inputs.weight.requires_grad_()
    y = run(problem, inputs)
    assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match=operator_call(problem, inputs)[0]):
        y.sum().backward()
    with torch.no_grad():
        assert not run(problem, inputs).requires_grad


@pytest.fixture
def default_dtype_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("function", [run, reference], ids=["operator", "reference"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_surroundings_have_no_influence(
    name: str, dtype: str, function: Callable[[Problem, Inputs], Tensor], request: pytest.FixtureRequest
) -> None:
    problem = with_dtype(ONE_OF_EACH[name], DTYPES[dtype])
    inputs = make_inputs(problem)
    expected = function(problem, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(problem, inputs), expected)
    with torch.inference_mode():
        assert torch.equal(function(problem, inputs), expected)
    request.getfixturevalue("default_dtype_float64")
    y = function(problem, inputs)
    assert y.dtype == problem.dtype and torch.equal(y, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nan_and_inf_propagate_through_the_reference(name: str, value: float) -> None:
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem)
    inputs.x[0, 2, 3, 4] = value
    y = run(problem, inputs)
    expected = run(problem, inputs.to(torch.float64))
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert not y.isfinite().all()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import kernels
layout = torch.channels_last
x = torch.randn(1, 4, 5, 5).contiguous(memory_format=layout)
weight = torch.randn(4, 4, 1, 1).contiguous(memory_format=layout)
kernels.conv2d_bias_act(x, weight, torch.zeros(4))
kernels.mean_linear(x, torch.zeros(3, 4), torch.zeros(3))
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
    for operator, line in zip(("conv2d_bias_act", "mean_linear"), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{operator} on a GPU needs the package triton: pip install")
