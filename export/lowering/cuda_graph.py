"""The fused program on an NVIDIA GPU: one CUDA graph per batch size, nothing but kernel launches per forward pass."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from export.base.errors import ExportError
from export.base.precision import Precision
from export.fusion.capture import plain_torch
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import FUSED_OPERATORS
from export.fusion.program import FusedProgram, call_inputs


@dataclass(frozen=True)
class _Captured:
    """A graph with the buffers it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Any


class CudaGraphProgram:
    """A fused program ready to run on one GPU.

    Weights are cast, packed channels_last and copied to the device once. The first batch of each size compiles its
    kernels and captures them; every later one is a copy into the graph's inputs, one graph launch and a copy of its
    outputs. Calls may come from any thread and any stream: they take turns on the device.

    Attributes:
        precision: of weights and activations.
        device: where it runs.
        interpreter: the same launches one by one, for whoever wants to see its intermediate values.
    """

    def __init__(self, program: FusedProgram, precision: Precision, device: torch.device | str = "cuda") -> None:
        """Raises ExportError without Triton, on a GPU before sm_80, or for a weight outside the range of the type."""
        try:
            from kernels import launch
        except ModuleNotFoundError as error:
            raise ExportError("triton is not installed; install it with: pip install 'triton>=3.6'") from error
        self.precision, self.device = precision, torch.device(device)
        try:
            if self.device.type == "cuda":
                launch.target_of(self.device)
        except ValueError as error:
            raise ExportError(str(error)) from error
        self._batch, self._inputs = program.batch, program.inputs
        graph_module = program.at(precision).to(self.device)
        self._weight_bytes = sum(t.numel() * t.element_size() for t in graph_module.state_dict().values())
        workspace = launch.Workspace(self.device)
        operators = {
            operator: functools.partial(launch.run, operator._opname, workspace=workspace)
            for operator in FUSED_OPERATORS
        }
        self.interpreter = GraphInterpreter(graph_module, operators)
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of device memory: `weights`, and `activations` of all graphs together, which share one pool."""
        segments = torch.cuda.memory_snapshot()
        pool = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))
        buffers = [x for captured in self._captured.values() for x in captured.inputs]
        inputs = sum(x.numel() * x.element_size() for x in buffers)
        return {"weights": self._weight_bytes, "activations": pool + inputs}

    def __call__(self, *inputs: Tensor, **by_name: Tensor) -> Any:
        """Run the network on [N, C, H, W], or on several inputs as the model is called: in order or by name.

        Args:
            inputs: on this device, of any floating-point type and memory layout; left as they were.
            by_name: the same.

        Returns:
            What the model returns, in the precision of this program, in new tensors; ordered on the current stream.

        Raises:
            ExportError: the inputs, the batch size, a shape, type or device are not what it takes.
        """
        ordered = call_inputs(self._inputs, self._batch, inputs, by_name)
        for x in ordered:
            if not x.is_floating_point() or x.device.type != self.device.type:
                raise ExportError(f"expected a floating-point input on {self.device}, got {x.dtype} on {x.device}")
        with self._lock, torch.cuda.device(self.device):
            captured = self._captured.get(len(ordered[0])) or self._capture(len(ordered[0]))
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._done)  # the call before this one has read its outputs, on whatever stream
            for buffer, x in zip(captured.inputs, ordered, strict=True):
                buffer.copy_(x)
            captured.graph.replay()
            outputs = pytree.tree_map_only(Tensor, torch.clone, captured.outputs)
            self._done.record(stream)
        return outputs

    def capture(self, batch: int) -> torch.cuda.CUDAGraph:
        """The graph of one batch size, for whoever fills its buffers and times its replays.

        Raises:
            ExportError: the program does not take this batch size.
        """
        call_inputs(self._inputs, self._batch, self._buffers(batch), {})
        with self._lock, torch.cuda.device(self.device):
            return (self._captured.get(batch) or self._capture(batch)).graph

    def _buffers(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of zeros, pictures channels_last."""
        zeros = [torch.zeros(batch, *s, dtype=self.precision.dtype, device=self.device) for s in self._inputs.values()]
        return tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in zeros)

    def _capture(self, batch: int) -> _Captured:
        """Run once to compile the kernels and to size the workspace, then capture the same launches."""
        inputs = self._buffers(batch)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with plain_torch(), torch.cuda.stream(stream):
            self.interpreter.run(*inputs)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are recorded; others may go on using the device.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                outputs = self.interpreter.run(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._captured[batch] = _Captured(graph, inputs, outputs)
        return self._captured[batch]
