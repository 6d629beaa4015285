"""What the launchers add to the kernels: outputs, configurations, workspaces, alignment, devices."""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kernels.launch
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.launch import Workspace, target_of
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, PairConfig
from kernels.operators.mean_linear import HeadConfig
from kernels.oracle import make_inputs, p1_failures
from kernels.problems import Problem
from tests.kernels.cases import BOTTLENECK_CASES, ODD_CASES, ONE_OF_EACH, PROJECTION_CASES, SMALL
from tests.kernels.launching import launch, operator, run
from tests.kernels.strategies import Layout, dense_order, is_dense

CONFIG = ConvConfig(64, 64, 32, 4, 2)


@pytest.mark.parametrize("name", ["conv", "bottleneck-residual", "head"])
def test_without_options_the_launcher_allocates_and_chooses(name: str, device: torch.device) -> None:
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem, device)
    y = run(inputs)
    assert p1_failures(y, problem, inputs) == []
    assert is_dense(y)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batch_0_launches_nothing(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ONE_OF_EACH[name].with_batch(0)
    monkeypatch.setattr(kernels.launch, "_launch", None)
    for function in (run, operator):
        y = function(make_inputs(problem, device))
        assert y.shape == problem.out_shape and y.shape[0] == 0 and y.dtype == problem.dtype


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "config",
    [ConvConfig(64, 64, 32, 4, 2, split_k=3), ConvConfig(32, 64, 32, 4, 2, box=(1, 4, 8))],
    ids=["split-k", "boxes"],
)
def test_nan_propagates_through_every_path(config: ConvConfig, device: torch.device) -> None:
    """Under padding too: what lies outside of the image is 0, whatever its neighbours in memory are."""
    inputs = make_inputs(SMALL, device)
    inputs.tensors()["x"][0, 2, 3, 4] = float("nan")
    y = launch(SMALL, inputs, config).cpu()
    expected = torch.zeros(SMALL.out_shape, dtype=torch.bool)
    expected[0, :, 2:5, 3:6] = True
    assert torch.equal(y.isnan(), expected)


WRONG_OUTPUTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "shape": ("conv", lambda out: out[:1]),
    "dtype": ("conv", Tensor.double),
    "layout": ("conv", lambda out: out.contiguous(memory_format=torch.contiguous_format)),
    "device": ("conv", lambda out: out.to("meta")),
    "layout of the head": ("head", lambda out: out.T.contiguous().T),
}


@pytest.mark.parametrize("broken", WRONG_OUTPUTS)
def test_a_wrong_output_tensor_is_refused(broken: str, device: torch.device) -> None:
    name, change = WRONG_OUTPUTS[broken]
    inputs = make_inputs(ONE_OF_EACH[name], device)
    shape = re.escape(str(ONE_OF_EACH[name].out_shape))
    with pytest.raises(ValueError, match=rf"out is .* strides .*, expected {shape}, torch.float16, .*, dense "):
        run(inputs, out=change(run(inputs)))


def test_float64_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"x is torch.float64, expected one of"):
        run(make_inputs(SMALL.with_dtype(torch.float64), device))


def test_an_invalid_config_is_refused(device: torch.device) -> None:
    inputs = make_inputs(ONE_OF_EACH["bottleneck-residual"], device)
    with pytest.raises(ValueError, match=r"cannot run .*num_warps is 3"):
        run(inputs, PairConfig(CONFIG, replace(CONFIG, num_warps=3)))


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
    Workspace(device).counters(8).fill_(1)
    inputs = make_inputs(SMALL, device)
    y = launch(SMALL, inputs, ConvConfig(64, 64, 32, 4, 2, split_k=3))
    assert p1_failures(y, SMALL, inputs) == []


BOXED: list[tuple[str, str, Config]] = [
    ("conv", "x", ConvConfig(32, 64, 32, 4, 2, box=(1, 4, 8))),
    ("projection", "shortcut_weight", ConvConfig(32, 64, 16, 4, 2, box=(1, 4, 8))),
    ("bottleneck-projection", "weight", BottleneckConfig(32, 64, 32, 4, 2, box=(1, 4, 8))),
    ("bottleneck-residual", "x", PairConfig(ConvConfig(32, 64, 32, 4, 2, box=(1, 4, 8)), CONFIG)),
]


@pytest.mark.parametrize(("name", "field", "config"), BOXED, ids=[name for name, _, _ in BOXED])
def test_unaligned_views_fall_back_from_boxes(name: str, field: str, config: Config, device: torch.device) -> None:
    problem = ONE_OF_EACH[name]
    inputs = make_inputs(problem, device)
    unaligned = Layout(dense_order(4), offset=1).of(getattr(inputs, field))
    assert unaligned.data_ptr() % 16
    y = launch(problem, replace(inputs, **{field: unaligned}), config)
    assert p1_failures(y, problem, inputs) == []


def test_any_stride_along_an_axis_of_one_element_goes_into_a_box(device: torch.device) -> None:
    """torch calls such tensors channels_last; a TMA descriptor takes strides of multiples of 16 bytes."""
    problem = ODD_CASES["one-pixel-image"].with_batch(1)
    inputs = make_inputs(problem, device)
    x = inputs.tensors()["x"]
    strange = x.as_strided(x.shape, (7, 1, 3, 5))
    assert strange.is_contiguous(memory_format=torch.channels_last)
    y = launch(problem, replace(inputs, **{"x": strange}), ConvConfig(16, 64, 32, 4, 2, box=(1, 4, 4)))
    assert p1_failures(y, problem, inputs) == []


def describe_device(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    limits = {"shared_memory_per_block_optin": 101_376, "multi_processor_count": 48}
    properties = SimpleNamespace(name="a GPU", major=major, minor=minor, **limits)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target_of.cache_clear()


def test_the_target_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    describe_device(monkeypatch, 9, 0)
    assert target_of(torch.device("cuda")) is TARGETS["sm_90"]
    describe_device(monkeypatch, 10, 3)
    unlisted = target_of(torch.device("cuda"))
    assert unlisted == Target("sm_103", 103, 101_376, 48)
    select_config(SMALL, unlisted)
    describe_device(monkeypatch, 7, 5)
    with pytest.raises(ValueError, match="a GPU is sm_75, expected sm_80 or newer"):
        target_of(torch.device("cuda"))
    target_of.cache_clear()
