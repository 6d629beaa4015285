"""What the launchers add to the kernels: outputs, configurations, workspaces, alignment, devices."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kernels
import kernels.launch
from kernels.configs.config import BottleneckConfig, Config, ConvConfig, HeadConfig, PairConfig, StemConfig
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.launch import Workspace, target_of
from kernels.oracle import Inputs, make_inputs, operator_call, p1_failures
from kernels.problems import Problem, with_dtype
from tests.kernels.cases import BOTTLENECK_CASES, DTYPES, ODD_CASES, ONE_OF_EACH, PROJECTION_CASES, SMALL
from tests.kernels.launching import launch, on_device, quick_config

CONFIG = ConvConfig(64, 64, 32, 4, 2)


def run(problem: Problem, inputs: Inputs, config: Config | None = None, out: Tensor | None = None) -> Tensor:
    name, arguments = operator_call(problem, inputs)
    return kernels.launch.run(name, *arguments, config=config, out=out)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_without_options_the_launcher_allocates_and_chooses(name: str, device: torch.device) -> None:
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem, device)
    y = run(problem, inputs)
    assert p1_failures(y, problem, inputs) == []
    assert y.is_contiguous(memory_format=torch.channels_last if y.ndim == 4 else torch.contiguous_format)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batch_0_launches_nothing(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem)
    empty = {"x": inputs.x[:0]} | {
        field: tensor[:0] for field, tensor in inputs.named().items() if field in ("residual", "shortcut")
    }
    monkeypatch.setattr(kernels.launch, "_launch", None)
    y = run(problem, replace(inputs, **empty).to(device))
    assert y.shape == (0, *problem.out_shape[1:]) and y.dtype == problem.dtype


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nan_and_inf_in_the_input_propagate(name: str, value: float, dtype: str, device: torch.device) -> None:
    problem = with_dtype(ONE_OF_EACH[name], DTYPES[dtype])
    inputs = make_inputs(problem, device)
    inputs.x[0, 2, 3, 4] = value
    if inputs.residual is not None:
        inputs.residual[1, 7, 0, 0] = value
    if inputs.shortcut is not None:
        inputs.shortcut[1, 7, 0, 0] = value
    y = launch(problem, inputs, on_device(quick_config(problem), device)).cpu()
    operator, arguments = operator_call(problem, inputs.to("cpu", torch.float64))
    expected = getattr(torch.ops.resnet_deploy, operator)(*arguments)
    touched = ~expected.isfinite()
    assert touched.any() and not touched.all()
    torch.testing.assert_close(y[touched].double(), expected[touched], equal_nan=True, rtol=0, atol=0)
    assert y[~touched].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "config",
    [ConvConfig(64, 64, 32, 4, 2, split_k=3), ConvConfig(32, 64, 32, 4, 2, box=(1, 4, 8))],
    ids=["split-k", "boxes"],
)
def test_nan_propagates_through_every_path(config: ConvConfig, device: torch.device) -> None:
    """Under padding too: what lies outside of the image is 0, whatever its neighbours in memory are."""
    inputs = make_inputs(SMALL, device)
    inputs.x[0, 2, 3, 4] = float("nan")
    y = launch(SMALL, inputs, config).cpu()
    expected = torch.zeros(SMALL.out_shape, dtype=torch.bool)
    expected[0, :, 2:5, 3:6] = True
    assert torch.equal(y.isnan(), expected)


def output(device: torch.device) -> Tensor:
    return torch.zeros(SMALL.out_shape, dtype=SMALL.dtype, device=device).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("broken", ["shape", "dtype", "layout", "device"])
def test_a_wrong_output_tensor_is_refused(broken: str, device: torch.device) -> None:
    out = output(device)
    out = {
        "shape": out[:1],
        "dtype": out.double(),
        "layout": out.contiguous(memory_format=torch.contiguous_format),
        "device": out.to("meta"),
    }[broken]
    with pytest.raises(ValueError, match=r"out is .* expected \(2, 40, 6, 7\), torch.float16"):
        run(SMALL, make_inputs(SMALL, device), out=out)


def test_a_wrong_output_of_the_head_is_refused(device: torch.device) -> None:
    head = ONE_OF_EACH["head"]
    out = torch.zeros(33, 5, dtype=head.dtype, device=device).T
    with pytest.raises(ValueError, match=r"out is .* strides \(1, 5\), expected \(5, 33\).* dense contiguous_format"):
        run(head, make_inputs(head, device), out=out)


def test_float64_is_refused(device: torch.device) -> None:
    problem = replace(SMALL, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x is torch.float64, expected one of"):
        run(problem, make_inputs(problem, device))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("conv", replace(CONFIG, block_k=8), "block_k is 8, expected a power of two of at least 16"),
        ("conv", HeadConfig(16, 16, 16, 4), "is a HeadConfig, expected a ConvConfig"),
        ("projection", replace(CONFIG, split_k=99), "split_k is 99"),
        ("bottleneck-residual", PairConfig(CONFIG, replace(CONFIG, num_warps=3)), "num_warps is 3"),
        ("bottleneck-projection", CONFIG, "is a ConvConfig, expected a BottleneckConfig"),
        ("stem", StemConfig(48, 16, 16, 1, 4, 2), "block_q is 48"),
        ("head", HeadConfig(16, 16, 0, 4), "block_k is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_an_invalid_config_is_refused(name: str, config: Config, message: str, device: torch.device) -> None:
    problem = ONE_OF_EACH[name]
    with pytest.raises(ValueError, match=f"cannot run .*{message}"):
        run(problem, make_inputs(problem, device), config)


def test_one_workspace_serves_launches_of_different_sizes(device: torch.device) -> None:
    """Counters are found at 0, left at 0, and grow with the largest launch."""
    workspace = Workspace(device)
    launches: list[tuple[Problem, Config]] = [
        (ODD_CASES["one-pixel-image"], ConvConfig(16, 64, 32, 4, 2, split_k=3)),
        (SMALL, ConvConfig(16, 64, 64, 4, 2, split_k=2)),
        (ONE_OF_EACH["head"], HeadConfig(16, 16, 32, 4)),
        (PROJECTION_CASES["odd-image"], ConvConfig(64, 64, 64, 4, 2, split_k=5)),
        (
            BOTTLENECK_CASES["c_mid-40-residual"],
            PairConfig(ConvConfig(64, 64, 32, 4, 2, split_k=4), ConvConfig(64, 128, 16, 4, 2, split_k=3)),
        ),
    ]
    for problem, config in launches:
        inputs = make_inputs(problem, device)
        y = launch(problem, inputs, config, workspace=workspace)
        assert p1_failures(y, problem, inputs) == []
        assert not workspace.counters(0).any()
    assert len(workspace.counters(0)) == 6, "6 blocks of 16 pixels are the most tiles of any launch"


def test_launches_with_a_workspace_each_do_not_share(device: torch.device) -> None:
    config = ConvConfig(64, 64, 32, 4, 2, split_k=3)
    dirty = Workspace(device)
    dirty.counters(8).fill_(1)
    inputs = make_inputs(SMALL, device)
    y = launch(SMALL, inputs, config)
    assert p1_failures(y, SMALL, inputs) == []


def unaligned(tensor: Tensor) -> Tensor:
    """The same tensor one element further on in memory."""
    layout = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    view = memory[1:].view(layout.shape).copy_(layout)
    assert view.data_ptr() % 16
    return view.permute(0, 3, 1, 2) if tensor.ndim == 4 else view


BOXED: dict[str, Config] = {
    "conv": ConvConfig(32, 64, 32, 4, 2, box=(1, 4, 8)),
    "projection": ConvConfig(32, 64, 16, 4, 2, box=(1, 4, 8)),
    "bottleneck-projection": BottleneckConfig(32, 64, 32, 4, 2, box=(1, 4, 8)),
}


@pytest.mark.parametrize("field", ["x", "weight", "shortcut_weight", "residual"])
@pytest.mark.parametrize("name", BOXED)
def test_unaligned_views_fall_back_from_boxes(name: str, field: str, device: torch.device) -> None:
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem, device)
    named = inputs.named()
    moved = {field: unaligned(named[field])} if field in named else {key: unaligned(t) for key, t in named.items()}
    moved_inputs = replace(inputs, **moved)
    y = launch(problem, moved_inputs, BOXED[name])
    assert p1_failures(y, problem, inputs) == []


def test_any_stride_along_an_axis_of_one_element_goes_into_a_box(device: torch.device) -> None:
    """torch calls such tensors channels_last; a TMA descriptor takes strides of multiples of 16 bytes."""
    problem = replace(ODD_CASES["one-pixel-image"], batch=1)
    inputs = make_inputs(problem, device)
    strange = inputs.x.as_strided(inputs.x.shape, (7, 1, 3, 5))
    assert strange.is_contiguous(memory_format=torch.channels_last)
    y = launch(problem, replace(inputs, x=strange), ConvConfig(16, 64, 32, 4, 2, box=(1, 4, 4)))
    assert p1_failures(y, problem, inputs) == []


def describe_device(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    properties = SimpleNamespace(
        name="a GPU", major=major, minor=minor, shared_memory_per_block_optin=101_376, multi_processor_count=48
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target_of.cache_clear()


def test_the_target_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    describe_device(monkeypatch, 9, 0)
    assert target_of(torch.device("cuda")) is TARGETS["sm_90"]
    describe_device(monkeypatch, 12, 1)
    unlisted = target_of(torch.device("cuda"))
    assert unlisted == Target("sm_121", 121, 101_376, 48)
    select_config(SMALL, unlisted)
    describe_device(monkeypatch, 7, 5)
    with pytest.raises(ValueError, match="a GPU is sm_75, expected sm_80 or newer"):
        target_of(torch.device("cuda"))
    target_of.cache_clear()


ON_CPU_WITHOUT_INTERPRETER = """
import torch
from kernels import launch
layout = torch.channels_last
x = torch.randn(1, 4, 5, 5).contiguous(memory_format=layout)
weight = torch.randn(4, 4, 1, 1).contiguous(memory_format=layout)
try:
    launch.run("conv2d_bias_act", x, weight, torch.zeros(4), None, (1, 1), (0, 0), (1, 1), 1, False)
except ValueError as error:
    print(error)
"""


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-c", ON_CPU_WITHOUT_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "x is on cpu, expected a CUDA device" in done.stdout
