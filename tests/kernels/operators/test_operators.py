"""The operators: dispatch, fakes, export, references and their surroundings."""

import importlib
import inspect
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from export import Batch, fuse
from export.base.precision import PRECISIONS
from kernels.operators.registry import OPERATORS
from kernels.oracle import make_inputs, oracle, p1_failures
from kernels.rounding import MAX_Z
from tests.kernels.cases import CASES, DTYPES, NETWORK_CASES, ONE_OF_EACH, SMALL
from tests.kernels.launching import composition, operator, same
from tests.kernels.strategies import OPERATORS as DRAWN
from tests.kernels.strategies import is_dense

# Without the convolutions of the networks, which add nothing but size.
REFERENCE_CASES = {name: p for name, p in CASES.items() if name.removeprefix("conv ") not in NETWORK_CASES}


def test_one_of_each_covers_every_operator() -> None:
    assert {problem.operator for problem in ONE_OF_EACH.values()} == OPERATORS.keys() == DRAWN.keys()


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
    problem = problem.with_dtype(torch.float64)
    wide = make_inputs(problem)
    _, sigma = oracle(problem.with_dtype(torch.float32), wide)  # 29 bits fewer
    difference = (operator(wide) - composition(problem, wide)).abs()
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


CALLED = {**ONE_OF_EACH, "defaults": replace(SMALL, padding=(0, 0), has_residual=False, relu=False)}


@pytest.mark.parametrize("name", CALLED)
def test_the_public_function_takes_hyperparameters_by_name(name: str) -> None:
    """Defaults are a stride of 1, no padding, no shortcut, no ReLU."""
    problem = CALLED[name]
    inputs = make_inputs(problem)
    function = getattr(importlib.import_module(f"kernels.operators.{problem.operator}"), problem.operator)
    defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "relu": False}
    given = {key: value for key, value in problem.settings.items() if (key, value) not in defaults.items()}
    assert torch.equal(function(*inputs.tensors().values(), **given), operator(inputs))
    assert [*inspect.signature(function).parameters] == [*OPERATORS[problem.operator].names()]


OPCHECKED = [*ONE_OF_EACH, "conv one-pixel-image", "conv one-channel-in-and-out", "stem one-pixel-image"]


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    inputs = make_inputs({**CASES, **ONE_OF_EACH}[name])
    torch.library.opcheck(getattr(torch.ops.resnet_deploy, inputs.operator).default, inputs.values())


@pytest.fixture(scope="module", params=["basic", "bottleneck"])
def network(
    request: pytest.FixtureRequest, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> tuple[GraphModule, Tensor]:
    """A fused ResNet, of four operators that between them are all five, and its inputs."""
    images = pictures[request.param]
    return fuse(calibrated[request.param], images, Batch(1, 4, 8)).at(PRECISIONS["fp32"]).requires_grad_(False), images


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_export_keeps_the_operators_and_the_dynamic_batch(decompose: bool, network: tuple[GraphModule, Tensor]) -> None:
    model, x = network
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    if decompose:
        program = program.run_decompositions()
    kept, asked = (
        Counter(name for node in graph.nodes if (name := str(node.target)).startswith("resnet_deploy."))
        for graph in (program.graph, model.graph)
    )
    assert kept == asked and len(kept) == 4
    batch, *_ = program.range_constraints.values()
    assert (batch.lower, batch.upper) == (1, 8)
    for size in (1, 2, 3, 8):
        assert torch.equal(program.module()(x[:size]), model(x[:size]))


def test_compile_keeps_the_operators(network: tuple[GraphModule, Tensor]) -> None:
    model, x = network
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 5):
        assert torch.equal(compiled(x[:size]), model(x[:size]))


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


def test_the_surroundings_have_no_influence(network: tuple[GraphModule, Tensor]) -> None:
    model, x = network
    expected = model(x)
    for surroundings in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with surroundings:
            assert torch.equal(model(x), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from torch._library.custom_ops import OPDEFS
from kernels.operators.mean_linear import mean_linear
arguments = torch.ones(1, 4, 1, 1), torch.ones(3, 4), torch.zeros(3)
assert mean_linear(*arguments).tolist() == [[4.0] * 3]
assert not torch.cuda.is_initialized()
try:
    OPDEFS["resnet_deploy::mean_linear"]._backend_fns["cuda"](*arguments)
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_triton_the_cpu_works_and_a_gpu_call_names_the_package() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mean_linear on a GPU needs the package triton: pip install")
