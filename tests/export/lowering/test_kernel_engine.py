"""Kernel engines: a network of all that lies between convolutions, compiled, and executed by the emulator."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from export import Batch, fuse
from export.base.normalisation import Normalisation
from export.base.precision import PRECISIONS
from export.criteria.kernel_blocks import emulated_rung
from export.criteria.operators import check_operators
from export.fusion.program import FusedProgram
from export.lowering import kernel_code
from export.lowering.kernel_cover import _worthwhile, batch_sizes
from export.lowering.kernel_emulation import run_whole
from export.lowering.kernel_engine import KernelEngine, Schedule, Step, lower_kernels
from export.runtime.engines.kernel_file import file_name, read_kernel_file
from kernels.configs.targets import TARGETS
from tests.export import zoo

HALF, SIZES, SIDE = PRECISIONS["fp16"], Batch(1, 2, 2), 12


class Everything(nn.Module):
    """Deep stem with max-pool, squeeze-and-excite of two kinds, ECA, a projection behind an average pool, a
    concatenation, an adaptive pool, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(zoo.conv(3, 8), zoo.linear(8, 8))
        self.pool = nn.MaxPool2d(2)
        self.squeeze = zoo.squeeze(8, gate=nn.Hardsigmoid)
        self.excite = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Sigmoid())
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.branch = nn.Sequential(zoo.conv(8, 8), zoo.linear(8, 16, s=2))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), zoo.linear(8, 16, 1))
        self.adaptive = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(4 * 24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(self.stem(x))
        x = torch.relu(x * self.squeeze(x) + x)
        y = self.branch(x)
        y = y * self.excite(y.mean((2, 3))).view(-1, 16, 1, 1)
        y = torch.relu(y + self.shortcut(x))
        gate = self.eca(y.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid()
        y = torch.cat([y * gate, y[:, 4:12] * 0.5], 1)
        return self.head(self.adaptive(y).flatten(1)), y


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own, so that what is compiled is."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "resnet-deploy" / "kernels"


@pytest.fixture(scope="module")
def program() -> FusedProgram:
    torch.manual_seed(0)
    model = Everything().train()
    for seed in range(4):
        model(zoo.pictures(16, seed=seed)[:, :, :SIDE, :SIDE])
    return fuse(model.eval(), torch.zeros(1, 3, SIDE, SIDE), SIZES)


@pytest.fixture(scope="module")
def engine(program: FusedProgram, cache: Path) -> KernelEngine:
    return lower_kernels(program, HALF, TARGETS["sm_87"], SIZES)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return {"input": np.ascontiguousarray(zoo.pictures(2, seed=9).numpy()[:, :, :SIDE, :SIDE])}


def test_the_plan_computes_the_network(program: FusedProgram, engine: KernelEngine, inputs: Mapping[str, Any]) -> None:
    """Every block of every launch, with the offsets and arguments of the file, against the captured graph."""
    outputs, defects, values = run_whole(engine, 2, inputs)
    assert not defects
    checks = check_operators(program, HALF, values)
    assert checks and len(checks.checks) > 12, checks.diagnosis
    expected = [y.detach().numpy() for y in program(torch.from_numpy(inputs["input"]))]
    for found, exact in zip(outputs.values(), expected, strict=True):
        assert np.abs(found - exact).max() < 4e-3 * np.abs(exact).max()


def test_a_smaller_batch_has_its_own_table(engine: KernelEngine, inputs: Mapping[str, Any]) -> None:
    both, _, _ = run_whole(engine, 2, inputs)
    for row in range(2):
        alone, defects, _ = run_whole(engine, 1, {"input": inputs["input"][row : row + 1]})
        assert not defects
        for name, y in alone.items():
            np.testing.assert_array_equal(y[0], both[name][row])


def test_bytes_are_normalised_by_the_first_launch(
    program: FusedProgram, engine: KernelEngine, inputs: Mapping[str, Any]
) -> None:
    normalisation = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    taking = lower_kernels(program, HALF, TARGETS["sm_87"], SIZES, normalisation)
    (given,) = read_kernel_file(taking.content).plan.inputs
    assert (given.dtype, given.layout, given.shape) == ("uint8", "NHWC", (SIDE, SIDE, 3))
    found, defects, _ = run_whole(taking, 2, {"input": pixels})
    expected, _, _ = run_whole(engine, 2, {"input": normalisation(pixels)})
    assert not defects
    for name, y in found.items():
        np.testing.assert_array_equal(y, expected[name])


def test_the_reader_takes_the_file(engine: KernelEngine) -> None:
    file = read_kernel_file(engine.content)
    assert engine.name == file_name("sm_87") and file.plan.target == "sm_87" and [*file.plan.batches] == [1, 2]
    assert {hashed: bytes(code) for hashed, code in file.cubins.items()} == {
        hashed: code.cubin for hashed, code in engine.codes.items()
    }
    assert {weight.offset: bytes(file.weights[weight.tensor]) for weight in file.plan.weights} == dict(engine.weights)
    assert [(output.name, output.shape) for output in file.plan.outputs] == [
        ("output_0", (5,)),
        ("output_1", (24, 3, 3)),
    ]
    json.dumps(engine.to_json())


def test_buffers_are_reused(engine: KernelEngine) -> None:
    for schedule in engine.schedules.values():
        assert schedule.arena.size <= 1.15 * schedule.arena.live and schedule.arena.size <= 0.5 * schedule.arena.all


def edited(engine: KernelEngine, number: int, **changes: Any) -> KernelEngine:
    schedule = engine.schedules[2]
    steps = [*schedule.steps]
    steps[number] = replace(steps[number], **changes)
    return with_schedule(engine, replace(schedule, steps=tuple(steps)))


def with_schedule(engine: KernelEngine, schedule: Schedule) -> KernelEngine:
    return replace(engine, schedules={1: engine.schedules[1], 2: schedule})


def a_step(engine: KernelEngine, operator: str) -> tuple[int, Step]:
    steps = enumerate(engine.schedules[2].steps)
    return next((number, step) for number, step in steps if step.launch.problem.operator == operator)


def swapped(engine: KernelEngine) -> KernelEngine:
    number, step = a_step(engine, "conv2d_bias_act")
    x, weight, bias, *rest = step.arguments
    return edited(engine, number, arguments=(x, bias, weight, *rest))


def wrong_weight(engine: KernelEngine) -> KernelEngine:
    number, step = a_step(engine, "conv2d_bias_act")
    places = [a["weight"] for s in engine.schedules[2].steps for a in s.arguments[1:2] if "weight" in a]
    other = next(place for place in places if place != step.arguments[1]["weight"])
    return edited(engine, number, arguments=(step.arguments[0], {"weight": other}, *step.arguments[2:]))


def wrong_size(engine: KernelEngine) -> KernelEngine:
    number, step = a_step(engine, "conv2d_bias_act")
    at = next(index for index, argument in enumerate(step.arguments) if argument == {"value": SIDE})
    arguments = (*step.arguments[:at], {"value": SIDE - 1}, *step.arguments[at + 1 :])
    return edited(engine, number, arguments=arguments)


def early_reuse(engine: KernelEngine) -> KernelEngine:
    """The last two buffers that live together at the same place."""
    schedule = engine.schedules[2]
    _, step = a_step(engine, "pool")
    x, y = step.arguments[0]["arena"], step.arguments[1]["arena"]

    def moved(argument: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"arena": x} if argument == {"arena": y} else argument

    steps = (replace(s, arguments=tuple(map(moved, s.arguments))) for s in schedule.steps)
    return with_schedule(engine, replace(schedule, steps=tuple(steps)))


def fewer_blocks(engine: KernelEngine) -> KernelEngine:
    number, step = a_step(engine, "elementwise")
    return edited(engine, number, launch=replace(step.launch, grid=(step.launch.grid[0] - 1,)))


DEFECTS = [swapped, wrong_weight, wrong_size, early_reuse, fewer_blocks]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda function: function.__name__)
def test_a_wrong_plan_is_seen(
    program: FusedProgram, engine: KernelEngine, inputs: Mapping[str, Any], defect: Any
) -> None:
    broken = defect(engine)
    _, defects, values = run_whole(broken, 2, inputs)
    assert defects or not check_operators(program, HALF, values)


def test_the_rung_says_how_much_was_emulated(engine: KernelEngine, inputs: Mapping[str, Any]) -> None:
    rung = emulated_rung(engine, inputs, SIZES)
    assert rung.operators is not None and rung.emulated is not None
    assert rung, rung.diagnosis
    blocks, grid = rung.emulated
    assert rung.verdict == f"emulated {blocks} of {grid} blocks" and 0 < blocks <= grid
    assert len(rung.operators.checks) >= len(engine.schedules[1].steps)
    assert rung.to_json()["emulated"] == {"blocks": blocks, "of": grid} and rung.to_json()["passed"] is True


@pytest.mark.parametrize("defect", [swapped, wrong_weight, wrong_size], ids=lambda function: function.__name__)
def test_the_rung_refuses_a_wrong_argument(engine: KernelEngine, inputs: Mapping[str, Any], defect: Any) -> None:
    broken = defect(engine)
    rung = emulated_rung(replace(broken, schedules={1: broken.schedules[2], 2: broken.schedules[2]}), inputs,
                         Batch(2, 2, 2))  # fmt: skip
    assert not rung and "emulated" not in rung.verdict and rung.to_json()["passed"] is False


def test_machine_code_is_kept(
    program: FusedProgram, engine: KernelEngine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_nothing(*arguments: Any, **options: Any) -> None:
        raise AssertionError("compiled again")

    kept = sorted(cache.glob("*.json"))
    assert len(kept) >= len(engine.codes)  # also those that were dropped
    with monkeypatch.context() as patch:
        patch.setattr(kernel_code, "Child", compile_nothing)
        assert lower_kernels(program, HALF, TARGETS["sm_87"], SIZES).content == engine.content
    record = json.loads(kept[0].read_text())
    kept[0].write_text(json.dumps({**record, "cubin": record["cubin"][::-1]}))  # damaged: compiled again
    assert lower_kernels(program, HALF, TARGETS["sm_87"], SIZES).content == engine.content
    assert json.loads(kept[0].read_text())["cubin"] == record["cubin"]


def test_sizes_of_a_range() -> None:
    assert batch_sizes(Batch(1, 8, 32)) == [*range(1, 33)]
    assert batch_sizes(Batch(4, 4, 4)) == [4]
    large = batch_sizes(Batch(1, 48, 256))
    assert {1, 32, 48, 256} <= {*large} and len(large) < 64
    assert all(after - before <= max(1, before // 8) for before, after in itertools.pairwise(large))


def test_a_configuration_that_saves_nothing_is_dropped() -> None:
    costs: Any = {1: {"a": 1.0, "b": 1.5, "c": 1.0}, 8: {"a": 3.0, "b": 2.0, "c": 2.01}}
    assert _worthwhile(["a", "b", "c"], costs) == ["c"]  # type: ignore[list-item]
    costs = {1: {"a": 1.0, "b": 1.5}, 8: {"a": 3.0, "b": 2.0}}
    assert _worthwhile(["a", "b"], costs) == ["a", "b"]  # type: ignore[list-item]


def test_cubins_have_no_lines_of_source(engine: KernelEngine, tmp_path: Path) -> None:
    (tmp_path / "engine").write_bytes(engine.content)
    with safe_open(tmp_path / "engine", "np") as file:
        assert not any(b"kernels/jit" in file.get_tensor(name).tobytes() for name in file.keys())  # noqa: SIM118
