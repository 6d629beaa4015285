"""What holds for every problem, layout, argument and configuration: examples are drawn, the float64 oracle judges."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.launch
from kernels.configs.config import Config, unsupported_reason
from kernels.launch import target_of
from kernels.oracle import MAX_Z, Inputs, has_relu, make_inputs, operator_call, oracle, p1_failures
from kernels.problems import (
    KERNEL_DTYPES,
    PROBLEMS,
    BottleneckProblem,
    ConvProblem,
    Problem,
    StemProblem,
    with_dtype,
)
from tests.kernels.launching import POISONS, launch, on_device, quick_config
from tests.kernels.strategies import (
    BOXABLE,
    LARGE,
    OPERATORS,
    SMALL,
    Limits,
    any_problem,
    bottleneck_configs,
    configs,
    conv_configs,
    examples,
    is_dense,
    laid_out,
    with_shortcut,
)

# The root mean square of z says something of many values.
MANY_VALUES = 64


def operator(problem: Problem, inputs: Inputs) -> Tensor:
    name, arguments = operator_call(problem, inputs)
    y: Tensor = getattr(torch.ops.resnet_deploy, name)(*arguments)
    return y


def quick_launch(problem: Problem, inputs: Inputs) -> Tensor:
    return launch(problem, inputs, on_device(quick_config(problem), inputs.x.device))


@dataclass(frozen=True)
class Way:
    """A way to compute an operator, and the largest problems to try it on."""

    run: Callable[[Problem, Inputs], Tensor]
    limits: Limits
    device: torch.device


@pytest.fixture(params=["operator", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def way(request: pytest.FixtureRequest) -> Way:
    """The operator on a CPU, or its Triton kernels in the interpreter or on a GPU."""
    if request.param == "operator":
        return Way(operator, LARGE, torch.device("cpu"))
    if request.param == "cuda":
        return Way(quick_launch, SMALL, torch.device("cuda"))
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: the same case runs on the GPU")
    return Way(quick_launch, SMALL, torch.device("cpu"))


def failures(y: Tensor, problem: Problem, inputs: Inputs) -> list[str]:
    """P1, of few values without the root mean square of z."""
    few = y.numel() < MANY_VALUES
    return [failure for failure in p1_failures(y, problem, inputs) if not (few and failure.startswith("rms z"))]


def outcome(run: Callable[[], Tensor]) -> Tensor | str:
    """What it returns, or the one line with which it refuses."""
    try:
        return run()
    except ValueError as error:
        assert "\n" not in str(error) and "expected" in str(error), f"{error}"
        return str(error)


@pytest.mark.parametrize("name", OPERATORS)
@examples(40)
@given(st.data())
def test_dense_tensors_give_what_the_oracle_gives_and_others_are_refused(
    name: str, way: Way, data: st.DataObject
) -> None:
    case = data.draw(laid_out(OPERATORS[name](way.limits)))
    inputs = case.inputs(way.device)
    given_inputs = inputs.clone()
    y = outcome(lambda: way.run(case.problem, inputs))
    assert inputs.equal(given_inputs)
    strided = [argument for argument, tensor in inputs.named().items() if not is_dense(tensor)]
    if isinstance(y, Tensor):
        assert strided == []
        assert failures(y, case.problem, given_inputs) == []
        assert is_dense(y)
        return
    (argument,) = strided
    if argument == "residual" and isinstance(case.problem, BottleneckProblem):
        argument = "shortcut"
    assert re.match(rf"{argument} (of shape .* )?has strides .*, expected", y)


def check_configuration(problem: Problem, config: Config, poison: float, device: torch.device) -> None:
    """P1 from poisoned memory. What the interpreter takes, a GPU may not."""
    target = target_of(device) if device.type == "cuda" else None
    reason = unsupported_reason(problem, config, target)
    assume(target is None or reason is None)
    assert reason is None
    inputs = make_inputs(problem, device)
    given_inputs = inputs.clone()
    assert failures(launch(problem, inputs, config, poison), problem, given_inputs) == []
    assert inputs.equal(given_inputs)


@pytest.mark.parametrize("name", OPERATORS)
@examples(30)
@given(st.data())
def test_the_kernels_equal_the_oracle_under_every_configuration(
    name: str, device: torch.device, data: st.DataObject
) -> None:
    problem = data.draw(OPERATORS[name](SMALL))
    check_configuration(problem, data.draw(configs(problem)), data.draw(st.sampled_from(POISONS)), device)


BOXED: dict[str, Callable[..., st.SearchStrategy[Config]]] = {
    "conv2d_bias_act": conv_configs,
    "conv2d_projection_bias_act": conv_configs,
    "conv2d_conv1x1_bias_act": bottleneck_configs,
}


@pytest.mark.parametrize("name", BOXED)
@examples(60)
@given(st.data())
def test_the_kernels_equal_the_oracle_over_boxes(name: str, device: torch.device, data: st.DataObject) -> None:
    problem = data.draw(OPERATORS[name](BOXABLE))
    config = data.draw(BOXED[name](problem))
    assert config.box is not None
    check_configuration(problem, config, data.draw(st.sampled_from(POISONS)), device)


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by name."""

    name: str
    arguments: dict[str, Any]

    def run(self) -> Tensor:
        y: Tensor = getattr(torch.ops.resnet_deploy, self.name)(*self.arguments.values())
        return y

    def fake(self) -> Tensor:
        with FakeTensorMode() as mode:
            faked = [
                mode.from_tensor(value) if isinstance(value, Tensor) else value for value in self.arguments.values()
            ]
            y: Tensor = getattr(torch.ops.resnet_deploy, self.name)(*faked)
        return y

    def launch(self) -> Tensor:
        return kernels.launch.run(self.name, *self.arguments.values())

    def problem_and_inputs(self) -> tuple[Problem, Inputs]:
        problem = PROBLEMS[self.name](*self.arguments.values())
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        if isinstance(problem, BottleneckProblem) and problem.has_residual:
            tensors["residual"] = tensors.pop("shortcut")
        return problem, Inputs(**tensors)


def call_of(problem: Problem, inputs: Inputs) -> Call:
    name, arguments = operator_call(problem, inputs)
    parameters = getattr(torch.ops.resnet_deploy, name).default._schema.arguments
    return Call(name, dict(zip([parameter.name for parameter in parameters], arguments, strict=True)))


DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.complex64,
)  # fmt: skip


def other_tensors(tensor: Tensor) -> st.SearchStrategy[Tensor]:
    """Of another dtype, or with an axis that is longer, shorter, missing or too many."""

    def of_length(axis: int, length: int) -> Tensor:
        shape = [*tensor.shape[:axis], length, *tensor.shape[axis + 1 :]]
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        values = torch.linspace(-1, 1, math.prod(shape), device=tensor.device).to(tensor.dtype)
        return values.reshape(shape).contiguous(memory_format=layout)

    axes = st.integers(0, tensor.ndim - 1)
    lengths = axes.flatmap(lambda axis: st.tuples(st.just(axis), st.integers(0, tensor.shape[axis] + 3)))
    return st.one_of(
        lengths.map(lambda drawn: of_length(*drawn)),
        st.sampled_from(DTYPES).map(tensor.to),
        axes.map(lambda axis: of_length(axis, 1)),
        axes.map(lambda axis: tensor.select(axis, 0)),
        axes.map(tensor.unsqueeze),
    )


@st.composite
def other_calls(draw: st.DrawFn, problems: st.SearchStrategy[Problem], device: torch.device) -> Call:
    """A right call of which one argument was replaced; where there are groups, they may not divide its outputs."""
    problem = draw(problems)
    if isinstance(problem, ConvProblem) and problem.groups > 1:
        problem = replace(problem, c_out=problem.c_out + draw(st.integers(0, 2)))
    call = call_of(problem, make_inputs(problem, device))
    name = draw(st.sampled_from([name for name, value in call.arguments.items() if value is not None]))
    value = call.arguments[name]
    if isinstance(value, Tensor):
        other: Any = draw(other_tensors(value))
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int):
        other = draw(st.integers(-1, 8))
    else:
        other = draw(st.lists(st.integers(-1, 8), min_size=0, max_size=3))
    return replace(call, arguments={**call.arguments, name: other})


@pytest.mark.parametrize("name", OPERATORS)
@examples(100)
@given(st.data())
def test_a_call_with_another_argument_is_right_or_refused(name: str, device: torch.device, data: st.DataObject) -> None:
    """By the operator, its fake and the launcher alike."""
    call = data.draw(other_calls(OPERATORS[name](SMALL), device))
    y = outcome(call.run)
    fake = outcome(call.fake)
    if isinstance(y, str):
        assert fake == y
        if call.arguments["x"].dtype in KERNEL_DTYPES:
            assert outcome(call.launch) == y
        return
    problem, inputs = call.problem_and_inputs()
    assert isinstance(fake, Tensor) and tuple(fake.shape) == tuple(y.shape) == problem.out_shape
    assert {tensor.dtype for tensor in inputs.named().values()} == {y.dtype}
    if y.numel() > 0:
        assert failures(y, problem, inputs) == []
        assert failures(quick_launch(problem, inputs), problem, inputs) == []


@pytest.mark.parametrize("name", OPERATORS)
@examples(40)
@given(st.data())
def test_the_fake_is_shaped_and_laid_out_like_the_real_output(name: str, data: st.DataObject) -> None:
    case = data.draw(laid_out(OPERATORS[name](LARGE)))
    call = call_of(case.problem, case.inputs())
    y, fake = outcome(call.run), outcome(call.fake)
    if isinstance(y, str) or isinstance(fake, str):
        assert fake == y
        return
    # Along an axis of one element any stride will do.
    strides = [(a, b) for a, b, size in zip(y.stride(), fake.stride(), y.shape, strict=True) if size > 1]
    assert (fake.shape, fake.dtype, fake.layout) == (y.shape, y.dtype, y.layout)
    assert all(a == b for a, b in strides), f"{y.stride()} of {tuple(y.shape)}, faked {fake.stride()}"
    assert fake.storage_offset() == y.storage_offset() and fake.requires_grad == y.requires_grad


def activations(inputs: Inputs) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.named().items() if name in ("x", "residual", "shortcut")}


def dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format)


@examples(30)
@given(st.data())
def test_permuted_images_give_permuted_outputs(way: Way, data: st.DataObject) -> None:
    """To P1: where an image lies among others can decide the order of its sums."""
    problem = data.draw(any_problem(way.limits))
    order = torch.tensor(data.draw(st.permutations(range(problem.batch))), device=way.device)
    inputs = make_inputs(problem, way.device)
    permuted = {name: dense(tensor[order]) for name, tensor in activations(inputs).items()}
    y = way.run(problem, replace(inputs, **permuted))
    _, sigma = oracle(problem, inputs)
    error = (y - way.run(problem, inputs)[order]).abs().cpu()
    assert bool((error <= MAX_Z[problem.dtype] * sigma[order.cpu()]).all())


def without_shortcut(problem: Problem) -> Problem:
    assert isinstance(problem, (ConvProblem, BottleneckProblem))
    return replace(problem, has_residual=False, projection=None)


@examples(30)
@given(st.data())
def test_a_shortcut_of_zeros_is_none(way: Way, data: st.DataObject) -> None:
    problem = data.draw(with_shortcut(way.limits))
    inputs = make_inputs(problem, way.device)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in activations(inputs).items() if name != "x"}
    none = dict.fromkeys(("residual", "shortcut", "shortcut_weight"))
    y = way.run(problem, replace(inputs, **zeros))
    assert torch.equal(y, way.run(without_shortcut(problem), replace(inputs, **none)))


@examples(30)
@given(st.data())
def test_without_bias_a_power_of_two_goes_through(way: Way, data: st.DataObject) -> None:
    """In float32, where no exponent ends in between; ReLU and maximum keep it as they are."""
    problem = with_dtype(data.draw(any_problem(way.limits)), torch.float32)
    factor = 2.0 ** data.draw(st.integers(-20, 20))
    inputs = make_inputs(problem, way.device)
    biases = {name: torch.zeros_like(t) for name, t in inputs.named().items() if name in ("bias", "expand_bias")}
    inputs = replace(inputs, **biases)
    scaled = {name: tensor * factor for name, tensor in activations(inputs).items()}
    assert torch.equal(way.run(problem, replace(inputs, **scaled)), way.run(problem, inputs) * factor)


def with_zero_channel(problem: Problem, inputs: Inputs) -> tuple[Problem, Inputs]:
    """One more channel of x, full of zeros, whose weights are large."""
    n, c, height, width = inputs.x.shape
    x = torch.cat([inputs.x, inputs.x.new_zeros(n, 1, height, width)], 1)
    weight = torch.cat([inputs.weight, torch.full_like(inputs.weight[:, :1], 1e4)], 1)
    wider = replace(inputs, x=dense(x), weight=dense(weight))
    if isinstance(problem, BottleneckProblem):
        return replace(problem, first=replace(problem.first, c_in=c + 1)), wider
    if isinstance(problem, StemProblem):
        return replace(problem, conv=replace(problem.conv, c_in=c + 1)), wider
    return replace(problem, c_in=c + 1), wider


@examples(30)
@given(st.data())
def test_a_channel_of_zeros_changes_nothing(way: Way, data: st.DataObject) -> None:
    """To P1: a longer reduction may be summed in another order."""
    problem = data.draw(any_problem(way.limits).filter(lambda problem: getattr(problem, "groups", 1) == 1))
    inputs = make_inputs(problem, way.device)
    y = way.run(*with_zero_channel(problem, inputs))
    assert failures(y, problem, inputs) == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", OPERATORS)
@examples(20)
@given(st.data())
def test_nan_and_inf_stay_in_their_image(name: str, way: Way, data: st.DataObject) -> None:
    """There they are where the oracle has them; every other image is what it was."""
    problem = data.draw(OPERATORS[name](way.limits))
    inputs = make_inputs(problem, way.device)
    if data.draw(st.booleans()):  # so that an infinity stays one and ReLU can end it, where a sum of both gives NaN
        weights = {name: tensor.abs() for name, tensor in inputs.named().items() if name.endswith("weight")}
        inputs = replace(inputs, **weights)
    clean = way.run(problem, inputs)
    tensor = inputs.named()[data.draw(st.sampled_from([*activations(inputs)]))]
    index = data.draw(st.tuples(*[st.integers(0, size - 1) for size in tensor.shape]))
    tensor[index] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    y = way.run(problem, inputs)
    pre, _ = oracle(problem, inputs)
    expected = pre.relu() if has_relu(problem) else pre
    others = [image for image in range(problem.batch) if image != index[0]]
    assert torch.equal(y[others], clean[others])
    classes = (torch.isnan, torch.isposinf, torch.isneginf)
    assert [kind(y).cpu().tolist() for kind in classes] == [kind(expected).tolist() for kind in classes]
