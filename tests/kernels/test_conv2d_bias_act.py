"""The operator: dispatch, fake, export, validation and reference."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import conv2d_bias_act, conv2d_bias_act_reference
from tests.kernels.conv_cases import DTYPES, NETWORK_CASES, ODD_CASES
from tests.kernels.oracle import Inputs, conv_arguments, make_inputs, p1_failures

SMALL = ODD_CASES["small"]
OPERATOR = torch.ops.resnet_deploy.conv2d_bias_act.default


def call(function: Callable[..., Tensor], inputs: Inputs, **arguments: object) -> Tensor:
    return function(inputs.x, inputs.weight, inputs.bias, inputs.residual, **arguments)


def positional(inputs: Inputs, relu: bool = True) -> tuple:
    return (inputs.x, inputs.weight, inputs.bias, inputs.residual, [1, 1], [1, 1], [1, 1], 1, relu)


@pytest.mark.parametrize("name", ODD_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_the_oracle(name: str, dtype: str) -> None:
    problem = replace(ODD_CASES[name], dtype=DTYPES[dtype])
    inputs = make_inputs(problem)
    given = inputs.clone()
    y = call(conv2d_bias_act_reference, inputs, **conv_arguments(problem))
    assert p1_failures(y, problem, given) == []
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, call(conv2d_bias_act, inputs, **conv_arguments(problem)))
    assert all(torch.equal(a, b) for a, b in zip(inputs.tensors(), given.tensors(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*NETWORK_CASES, *ODD_CASES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_on_a_gpu_equals_the_oracle(name: str, dtype: str) -> None:
    problem = replace({**NETWORK_CASES, **ODD_CASES}[name], dtype=DTYPES[dtype])
    inputs = make_inputs(problem, "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = call(conv2d_bias_act, inputs, **conv_arguments(problem)).cpu()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert p1_failures(y, problem, inputs) == []


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_reference_in_float64_is_the_plain_composition(residual: bool, relu: bool) -> None:
    problem = replace(SMALL, dtype=torch.float64, stride=(2, 1), groups=4, has_residual=residual, relu=relu)
    inputs = make_inputs(problem)
    expected = F.conv2d(inputs.x, inputs.weight, inputs.bias, problem.stride, problem.padding, 1, problem.groups)
    expected = expected if inputs.residual is None else expected + inputs.residual
    expected = F.relu(expected) if relu else expected
    assert torch.equal(call(conv2d_bias_act, inputs, **conv_arguments(problem)), expected)


def test_batch_0_gives_an_empty_output() -> None:
    inputs = make_inputs(replace(SMALL, batch=0))
    y = call(conv2d_bias_act, inputs, padding=(1, 1))
    assert y.shape == (0, SMALL.c_out, SMALL.height, SMALL.width) and y.dtype == SMALL.dtype


@pytest.mark.parametrize("name", ["small", "one-pixel-image", "one-channel-in-and-out", "c_in-5"])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(OPERATOR, positional(make_inputs(replace(ODD_CASES[name], dtype=dtype))))


def test_the_fake_output_is_shaped_and_laid_out_like_the_real_one() -> None:
    for problem in ODD_CASES.values():
        inputs = make_inputs(problem)
        real = call(conv2d_bias_act, inputs, **conv_arguments(problem))
        with FakeTensorMode() as mode:
            fakes = [None if t is None else mode.from_tensor(t) for t in positional(inputs)[:4]]
            fake = conv2d_bias_act(*fakes, **conv_arguments(problem))
        assert fake.shape == real.shape and fake.dtype == real.dtype
        assert fake.is_contiguous(memory_format=torch.channels_last)


class TwoConvolutions(nn.Module):
    """y = relu(conv(x)); relu(conv(y) + x): both forms of the operator, weights as buffers."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(8, 8, 3, 3) / 8
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = conv2d_bias_act(x, self.weight, self.bias, padding=(1, 1), relu=True)
        return conv2d_bias_act(y, self.weight, self.bias, x, padding=(1, 1), relu=True)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 8, 6, 5).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_export_keeps_the_operator_and_the_dynamic_batch(decompose: bool) -> None:
    model = TwoConvolutions()
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=32)}}
    program = torch.export.export(model, (images(2),), dynamic_shapes=dynamic)
    if decompose:
        program = program.run_decompositions()
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 2
    (batch,) = program.range_constraints.values()
    assert (batch.lower, batch.upper) == (1, 32)
    for size in (1, 2, 3, 32):
        x = images(size)
        assert torch.equal(program.module()(x), model(x))


def test_compile_keeps_the_operator() -> None:
    model = TwoConvolutions()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 5):
        x = images(size)
        assert torch.equal(compiled(x), model(x))


def test_gradients_are_refused_and_never_wrong() -> None:
    inputs = make_inputs(replace(SMALL, dtype=torch.float32))
    expected = call(conv2d_bias_act, inputs, padding=(1, 1))
    inputs.weight.requires_grad_()
    y = call(conv2d_bias_act, inputs, padding=(1, 1))
    assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match="conv2d_bias_act"):
        y.sum().backward()
    with torch.no_grad():
        assert not call(conv2d_bias_act, inputs, padding=(1, 1)).requires_grad


@pytest.fixture
def default_dtype_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("function", [conv2d_bias_act, conv2d_bias_act_reference])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_surroundings_have_no_influence(
    function: Callable[..., Tensor], dtype: str, request: pytest.FixtureRequest
) -> None:
    problem = replace(SMALL, dtype=DTYPES[dtype])
    inputs = make_inputs(problem)
    expected = call(function, inputs, **conv_arguments(problem))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(function, inputs, **conv_arguments(problem)), expected)
    with torch.inference_mode():
        assert torch.equal(call(function, inputs, **conv_arguments(problem)), expected)
    request.getfixturevalue("default_dtype_float64")
    y = call(function, inputs, **conv_arguments(problem))
    assert y.dtype == problem.dtype and torch.equal(y, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_propagate_through_the_reference(value: float) -> None:
    inputs = make_inputs(SMALL)
    inputs.x[0, 2, 3, 4] = value
    y = call(conv2d_bias_act, inputs, **conv_arguments(SMALL))
    expected = call(conv2d_bias_act, replace_dtype(inputs, torch.float64), **conv_arguments(SMALL))
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert not y.isfinite().all()


def replace_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(*(tensor.to(dtype) for tensor in inputs.tensors()))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import kernels
from kernels.conv2d_bias_act import _conv2d_bias_act_cuda
layout = torch.channels_last
x = torch.randn(1, 4, 5, 5).contiguous(memory_format=layout)
weight = torch.randn(4, 4, 1, 1).contiguous(memory_format=layout)
kernels.conv2d_bias_act(x, weight, torch.zeros(4))
assert not torch.cuda.is_initialized()
try:
    _conv2d_bias_act_cuda(x, weight, torch.zeros(4), None, [1, 1], [0, 0], [1, 1], 1, False)
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_triton_the_cpu_works_and_a_gpu_call_names_the_package() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True)
    assert "needs the package triton" in done.stdout and "pip install" in done.stdout
