"""The fused program in Triton kernels and as CUDA graphs: changing inputs, batch sizes, layouts and threads.

Without a GPU the kernels run in the interpreter, and the tests of graphs on a stand-in for CUDA's: what is captured is
remembered, and a replay computes it again from the static input into the static outputs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from export import Batch, ExportError, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import FUSED_OPERATORS
from export.lowering.cuda_graph import CudaGraphProgram
from export.lowering.runners import ProgramRunner
from kernels import launch
from kernels.operators.registry import OPERATORS
from tests.export import networks
from tests.export.networks import Fused, judged
from tests.kernels.launching import quick_config

FP16 = PRECISIONS["fp16"]
FEW = Batch(1, 2, 4)
SIZE = 16


class StandInGraph:
    recording: StandInGraph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[GraphInterpreter, Tensor, Any]] = []

    def replay(self) -> None:
        for interpreter, x, outputs in self.calls:
            results = pytree.tree_leaves(interpreter.run(x))
            for static, new in zip(pytree.tree_leaves(outputs), results, strict=True):
                static.copy_(new)


class RecordingInterpreter(GraphInterpreter):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().run(*args, **kwargs)
        if StandInGraph.recording is not None:
            StandInGraph.recording.calls.append((self, args[0], outputs))
        return outputs


@contextlib.contextmanager
def capturing(graph: StandInGraph, **options: Any) -> Iterator[None]:
    StandInGraph.recording = graph
    try:
        yield
    finally:
        StandInGraph.recording = None


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        return "cuda"
    if torch.cuda.is_available():
        pytest.skip("the stand-in is for machines without a GPU")
    stream = SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda other: None, synchronize=lambda: None)
    replacements = {
        "CUDAGraph": StandInGraph,
        "graph": capturing,
        "Event": lambda: SimpleNamespace(record=lambda stream: None),
        "Stream": lambda device: stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "memory_snapshot": lambda: [
            {"segment_pool_id": (0, 1), "total_size": 4096},
            {"segment_pool_id": (0, 0), "total_size": 1 << 30},
        ],
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("export.lowering.cuda_graph.GraphInterpreter", RecordingInterpreter)
    return "cpu"


@pytest.fixture(scope="module")
def network(pictures: Mapping[str, Tensor]) -> Fused:
    """Of three layers and two outputs, for images small enough for Triton's interpreter."""
    few = pictures["resnet8"][:, :, :SIZE, :SIZE].contiguous()
    return Fused(networks.make(networks.two_heads, few), few)


@pytest.fixture
def program(network: Fused) -> FusedProgram:
    return network.program


def assert_right(program: FusedProgram, x: Tensor, outputs: Any) -> None:
    """Each of the three layers rounds its weights, what it reads and its result."""
    with torch.no_grad():
        expected = pytree.tree_leaves(program.folded(x.cpu().contiguous().double()))
    for y, y64 in zip(pytree.tree_leaves(outputs), expected, strict=True):
        assert y.dtype == torch.float16 and y.shape == y64.shape
        assert (y.double().cpu() - y64).norm() <= 9 * FP16.roundoff * y64.norm()


def images(batch: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, SIZE, SIZE, generator=generator).to(device)


@pytest.fixture
def graphs(program: FusedProgram, device: str) -> CudaGraphProgram:
    return CudaGraphProgram(program, FP16, device)


def test_changing_inputs_and_batch_sizes(program: FusedProgram, graphs: CudaGraphProgram, device: str) -> None:
    """Each size is captured once, and a later call leaves the outputs of earlier ones alone."""
    calls: list[tuple[Tensor, Any]] = []
    for seed, batch in enumerate((2, 1, 2, 4, 1)):
        x = images(batch, device, seed)
        calls.append((x.clone(), graphs(x)))
        assert torch.equal(x, calls[-1][0])
    for x, outputs in calls:
        assert_right(program, x, outputs)
    assert graphs.capture(2) is graphs.capture(2) is not graphs.capture(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_layout_and_type_of_input(
    layout: torch.memory_format, dtype: torch.dtype, program: FusedProgram, graphs: CudaGraphProgram, device: str
) -> None:
    x = images(2, device, 3).to(dtype).contiguous(memory_format=layout)
    assert_right(program, x, graphs(x))


def test_threads_take_turns(program: FusedProgram, graphs: CudaGraphProgram, device: str) -> None:
    inputs = [images(1 + seed % 3, device, seed) for seed in range(6)]
    outputs: list[Any] = [None] * len(inputs)

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
            outputs[index] = pytree.tree_map_only(Tensor, lambda t: t.cpu(), graphs(inputs[index]))

    if device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, y in zip(inputs, outputs, strict=True):
        assert_right(program, x, y)


def test_memory_is_stated(network: Fused, graphs: CudaGraphProgram, device: str) -> None:
    graphs(images(4, device, 0))
    layers = [module for module in network.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert graphs.memory["weights"] == 2 * sum(p.numel() for layer in layers for p in layer.parameters())
    assert 2 * 4 * 3 * SIZE * SIZE < graphs.memory["activations"] < 1 << 28


REFUSED = {
    "image size": (torch.zeros(2, 3, 16, 7), r"of shape \[1:4:8, \*\[3, 16, 16\]\], got \[2, 3, 16, 7\]"),
    "batch": (torch.zeros(9, 3, SIZE, SIZE), r"got \[9, 3, 16, 16\]"),
    "integers": (torch.zeros(2, 3, SIZE, SIZE).byte(), "expected a floating-point input on .*, got torch.uint8"),
    "device": (torch.zeros(2, 3, SIZE, SIZE, device="meta"), "got torch.float32 on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_take_is_refused(case: str, graphs: CudaGraphProgram, device: str) -> None:
    x, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        graphs(x if x.is_meta else x.to(device))


def launcher(name: str) -> Callable[..., Tensor]:
    """An operator by its Triton launcher whatever the device, in few large tiles: the interpreter pays per tile."""

    def call(*arguments: Any) -> Tensor:
        return launch.run(name, *arguments, config=quick_config(OPERATORS[name].of(*arguments).problem()))

    return call


LAUNCHERS: dict[Callable[..., Any], Any] = {op: launcher(op._opname) for op in FUSED_OPERATORS}


def check(network: Fused, precision: str, device: str, operators: dict[Callable[..., Any], Any]) -> None:
    program = fuse(network.model, network.images, FEW)
    assert not program.coverage.left
    runner = ProgramRunner(program, PRECISIONS[precision], ("output",), device, operators)
    rung = judged(runner, network, program, precision)
    assert rung.name == "triton" and rung, rung.verdict
    assert rung.operators is not None and not rung.operators.unchecked
    assert len(rung.operators.checks) == len(program.coverage.fused)
    assert all(check.decision != "differs" for check in rung.outputs.values())


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@interpreted
@pytest.mark.parametrize(("name", "precision"), [*(("resnet8", p) for p in PRECISIONS), ("bottleneck", "fp16")])
def test_through_the_interpreter(name: str, precision: str, fused: Mapping[str, Fused]) -> None:
    images = fused[name].images[:2]
    size = SIZE if name == "resnet8" else 2 * SIZE
    images = images[:, :, :size, :size].contiguous()
    check(Fused(fused[name].model, images), precision, "cpu", LAUNCHERS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["basic", "resnet50"])
def test_network_on_a_gpu(name: str, precision: str, fused: Mapping[str, Fused]) -> None:
    check(fused[name], precision, "cuda", {})
