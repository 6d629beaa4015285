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

import kernels.launch
from kernels.configs.config import Config
from kernels.launch import target_of
from kernels.operators.activations import ACTIVATIONS
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.registry import OPERATORS as OPERATOR_ARGUMENTS
from kernels.oracle import make_inputs, oracle, p1_failures
from kernels.problems import KERNEL_DTYPES, ConvProblem, Problem
from kernels.rounding import MAX_Z
from tests.kernels.launching import POISONS, assert_like, fake, launch, on_device, operator, quick_config, same
from tests.kernels.strategies import (
    BOXABLE,
    LARGE,
    OPERATORS,
    SMALL,
    Limits,
    any_problem,
    boxed_configs,
    configs,
    dense,
    examples,
    is_dense,
    laid_out,
)

MANY_VALUES = 64  # of fewer the root mean square of z says nothing
Inputs = Any  # an Arguments[Tensor], whose fields are its operator's


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
        return Way(lambda _, inputs: operator(inputs), LARGE, torch.device("cpu"))
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
    """The operator's fake refuses alike, or is shaped and laid out like the real output."""
    problem = data.draw(OPERATORS[name](way.limits))
    inputs = data.draw(laid_out(problem, way.device))
    given_inputs = inputs.map(lambda tensor: tensor.detach().clone())
    y = outcome(lambda: way.run(problem, inputs))
    assert same(inputs, given_inputs)
    if way.limits is LARGE:
        assert_like(outcome(lambda: fake(inputs)), y)
    strided = [argument for argument, tensor in inputs.tensors().items() if not is_dense(tensor)]
    if isinstance(y, Tensor):
        assert strided == []
        assert failures(y, problem, given_inputs) == []
        assert is_dense(y)
        return
    (argument,) = strided
    assert re.match(rf"{argument} (of shape .* )?has strides .*, expected", y)


def check_configuration(problem: Problem, config: Config, poison: float, device: torch.device) -> None:
    """P1 from poisoned memory. What the interpreter takes, a GPU may not."""
    target = target_of(device) if device.type == "cuda" else None
    reason = config.unsupported_reason(problem, target)
    assume(target is None or reason is None)
    assert reason is None
    inputs = make_inputs(problem, device)
    given_inputs = inputs.map(Tensor.clone)
    assert failures(launch(problem, inputs, config, poison), problem, given_inputs) == []
    assert same(inputs, given_inputs)


@pytest.mark.parametrize("name", OPERATORS)
@examples(30)
@given(st.data())
def test_the_kernels_equal_the_oracle_under_every_configuration(
    name: str, device: torch.device, data: st.DataObject
) -> None:
    problem = data.draw(OPERATORS[name](SMALL))
    check_configuration(problem, data.draw(configs(problem)), data.draw(st.sampled_from(POISONS)), device)


BOXED = ("conv2d_bias_act", "conv2d_projection_bias_act", "conv2d_conv1x1_bias_act")


@pytest.mark.parametrize("name", BOXED)
@examples(60)
@given(st.data())
def test_the_kernels_equal_the_oracle_over_boxes(name: str, device: torch.device, data: st.DataObject) -> None:
    problem = data.draw(OPERATORS[name](BOXABLE))
    config = data.draw(boxed_configs(problem))
    assert config.box is not None
    check_configuration(problem, config, data.draw(st.sampled_from(POISONS)), device)


DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.complex64,
)  # fmt: skip


def other_tensors(tensor: Tensor) -> st.SearchStrategy[Tensor]:
    """Of another dtype, or with an axis that is longer, shorter, missing or too many."""

    def of_length(axis: int, length: int) -> Tensor:
        shape = [*tensor.shape[:axis], length, *tensor.shape[axis + 1 :]]
        values = torch.linspace(-1, 1, math.prod(shape), device=tensor.device).to(tensor.dtype)
        return dense(values.reshape(shape))

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
def other_calls(draw: st.DrawFn, problems: st.SearchStrategy[Problem], device: torch.device) -> Inputs:
    """A right call of which one argument was replaced; where there are groups, they may not divide its outputs."""
    problem = draw(problems)
    if isinstance(problem, ConvProblem) and problem.groups > 1:
        problem = replace(problem, c_out=problem.c_out + draw(st.integers(0, 2)))
    call = make_inputs(problem, device)
    name = draw(st.sampled_from([name for name in call.names() if getattr(call, name) is not None]))
    value = getattr(call, name)
    if isinstance(value, Tensor):
        other: Any = draw(other_tensors(value))
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int):
        other = draw(st.integers(-1, 8))
    elif isinstance(value, float):
        other = draw(st.floats(-2, 2) | st.just(math.nan))
    elif isinstance(value, str):
        other = draw(st.sampled_from(["", "relu", "swish", *ACTIVATIONS]))
    else:
        other = draw(st.lists(st.integers(-1, 8), min_size=0, max_size=3).map(tuple))
    return replace(call, **{name: other})


@pytest.mark.parametrize("name", OPERATORS)
@examples(100)
@given(st.data())
def test_a_call_with_another_argument_is_right_or_refused(name: str, device: torch.device, data: st.DataObject) -> None:
    """By the operator, its fake and the launcher alike."""
    call = data.draw(other_calls(OPERATORS[name](SMALL), device))
    y, faked = outcome(lambda: operator(call)), outcome(lambda: fake(call))
    if isinstance(y, str):
        assert faked == y
        if call.x.dtype in KERNEL_DTYPES:
            assert outcome(lambda: kernels.launch.run(call.operator, *call.values())) == y
        return
    problem = call.problem()
    assert isinstance(faked, Tensor) and tuple(faked.shape) == tuple(y.shape) == problem.out_shape
    assert {tensor.dtype for tensor in call.tensors().values()} == {y.dtype}
    if y.numel() > 0:
        assert failures(y, problem, call) == []
        assert failures(quick_launch(problem, call), problem, call) == []


def activations(inputs: Inputs) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.tensors().items() if name in ("x", "residual", "shortcut")}


@examples(30)
@given(st.data())
def test_without_bias_a_power_of_two_goes_through(way: Way, data: st.DataObject) -> None:
    """In float32, where no exponent ends in between; ReLU, its leaky kin and maximum keep it as they are."""
    keep = ("", "leaky_relu", "prelu")
    problems = any_problem(way.limits).filter(lambda drawn: getattr(drawn, "activation", "") in keep)
    problem = data.draw(problems).with_dtype(torch.float32)
    factor = 2.0 ** data.draw(st.integers(-20, 20))
    inputs = make_inputs(problem, way.device)
    biases = {name: torch.zeros_like(t) for name, t in inputs.tensors().items() if name in ("bias", "expand_bias")}
    inputs = replace(inputs, **biases)
    scaled = {name: tensor * factor for name, tensor in activations(inputs).items()}
    assert torch.equal(way.run(problem, replace(inputs, **scaled)), way.run(problem, inputs) * factor)


def with_zero_channel(problem: Problem, inputs: Inputs) -> tuple[Problem, Inputs]:
    """One more channel of x, full of zeros, whose weights are large."""
    x, weight = (inputs.tensors()[name] for name in ("x", "weight"))
    x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    weight = torch.cat([weight, torch.full_like(weight[:, :1], 1e4)], 1)
    wider = replace(inputs, **{"x": dense(x), "weight": dense(weight)})
    return wider.problem(), wider


@examples(30)
@given(st.data())
def test_images_stand_alone_and_a_channel_of_zeros_changes_nothing(way: Way, data: st.DataObject) -> None:
    """To P1: where an image lies among others, and how long a reduction is, can decide the order of sums."""
    problem = data.draw(any_problem(way.limits))
    order = torch.tensor(data.draw(st.permutations(range(problem.batch))), device=way.device)
    inputs = make_inputs(problem, way.device)
    permuted = {name: dense(tensor[order]) for name, tensor in activations(inputs).items()}
    y = way.run(problem, replace(inputs, **permuted))
    expected = oracle(problem, inputs)
    error = (y - way.run(problem, inputs)[order]).abs().cpu()
    assert bool((error <= MAX_Z[problem.dtype] * expected[1][order.cpu()]).all())
    if getattr(problem, "groups", 1) == 1:
        y = way.run(*with_zero_channel(problem, inputs))
        assert failures(y, problem, inputs) == []


@examples(30)
@given(st.data())
def test_a_shortcut_of_zeros_is_none(way: Way, data: st.DataObject) -> None:
    problem = data.draw(
        any_problem(way.limits).filter(lambda drawn: bool({"residual", "shortcut"} & set(drawn.shapes)))
    )
    assert isinstance(problem, ConvProblem | BottleneckProblem)
    inputs = make_inputs(problem, way.device)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in activations(inputs).items() if name != "x"}
    y = way.run(problem, replace(inputs, **zeros))
    without = replace(problem, has_residual=False, projection=None)
    tensors = {name: getattr(inputs, name) for name in without.shapes}
    none = OPERATOR_ARGUMENTS[without.operator](**tensors, **without.settings)
    assert torch.equal(y, way.run(without, none))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", OPERATORS)
@examples(20)
@given(st.data())
def test_nan_and_inf_stay_in_their_image(name: str, way: Way, data: st.DataObject) -> None:
    """There they are where the oracle has them; every other image is what it was."""
    problem = data.draw(OPERATORS[name](way.limits))
    inputs = make_inputs(problem, way.device)
    if data.draw(st.booleans()):  # so that an infinity stays one and ReLU can end it, where a sum of both gives NaN
        weights = {name: tensor.abs() for name, tensor in inputs.tensors().items() if name.endswith("weight")}
        inputs = replace(inputs, **weights)
    clean = way.run(problem, inputs)
    tensor = inputs.tensors()[data.draw(st.sampled_from([*activations(inputs)]))]
    index = data.draw(st.tuples(*[st.integers(0, size - 1) for size in tensor.shape]))
    tensor[index] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    y = way.run(problem, inputs)
    pre, _ = oracle(problem, inputs)
    expected = inputs.map(lambda tensor: tensor.detach().cpu().double()).activated(pre)
    others = [image for image in range(problem.batch) if image != index[0]]
    assert torch.equal(y[others], clean[others])
    classes = (torch.isnan, torch.isposinf, torch.isneginf)
    assert [kind(y).cpu().tolist() for kind in classes] == [kind(expected).tolist() for kind in classes]
