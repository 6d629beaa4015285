"""The fused program as CUDA graphs: changing inputs, batch sizes, layouts, streams and threads.

Without a GPU the same tests run on a stand-in for CUDA's graphs: what is captured is remembered, and a replay computes
it again from the static input into the static outputs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from export import Batch, ExportError, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.fusion.interpreter import GraphInterpreter
from export.lowering.cuda_graph import CudaGraphProgram
from tests.export.networks import Called

FP16 = PRECISIONS["fp16"]


def _two_outputs(x: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    x = torch.relu(m.conv1(x))
    x = torch.relu(m.conv2(x) + x)
    return x, m.fc(x.mean((2, 3)))


def small() -> nn.Module:
    """Two outputs, one of them a residual block's."""
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    return Called(_two_outputs, conv1=conv1, conv2=conv2, fc=nn.Linear(16, 5)).eval()


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
def program() -> FusedProgram:
    return fuse(small(), torch.zeros(1, 3, 6, 6), Batch(1, 2, 4))


def assert_right(program: FusedProgram, x: Tensor, outputs: Any) -> None:
    """Each of the three layers rounds its weights, what it reads and its result."""
    with torch.no_grad():
        expected = pytree.tree_leaves(program.folded(x.cpu().contiguous().double()))
    for y, y64 in zip(pytree.tree_leaves(outputs), expected, strict=True):
        assert y.dtype == torch.float16 and y.shape == y64.shape
        assert (y.double().cpu() - y64).norm() <= 9 * FP16.roundoff * y64.norm()


def images(batch: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 6, 6, generator=generator).to(device)


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


def test_memory_is_stated(graphs: CudaGraphProgram, device: str) -> None:
    graphs(images(4, device, 0))
    parameters = sum(p.numel() for p in small().parameters())
    assert graphs.memory["weights"] == 2 * parameters
    assert 2 * 4 * 3 * 6 * 6 < graphs.memory["activations"] < 1 << 28


REFUSED = {
    "image size": (torch.zeros(2, 3, 6, 7), r"of shape \[1:2:4, \*\[3, 6, 6\]\], got \[2, 3, 6, 7\]"),
    "batch": (torch.zeros(5, 3, 6, 6), r"got \[5, 3, 6, 6\]"),
    "integers": (torch.zeros(2, 3, 6, 6).byte(), "expected a floating-point input on .*, got torch.uint8"),
    "device": (torch.zeros(2, 3, 6, 6, device="meta"), "got torch.float32 on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_take_is_refused(case: str, graphs: CudaGraphProgram, device: str) -> None:
    x, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        graphs(x if x.is_meta else x.to(device))
