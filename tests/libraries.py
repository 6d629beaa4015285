"""What libraries do anew at each of thousands of calls, done once: none of it depends on what is called."""

from __future__ import annotations

import copy
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from torch._export import utils as torch_export
from torch.onnx._internal.exporter._registration import ONNXRegistry
from triton import language as tl
from triton.runtime import interpreter


class _PatchedOnce:
    """Triton's interpreter patches all of its language at each call of a function by a kernel; here once per kernel."""

    def __init__(self) -> None:
        self._patch, self._done = interpreter._patch_lang, set[int]()

    def __call__(self, function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if languages <= self._done:
            return interpreter._LangPatchScope()  # with nothing to restore
        self._done |= languages
        scope = self._patch(function)
        return SimpleNamespace(restore=partial(self._restore, scope))

    def _restore(self, scope: Any) -> None:
        self._done.clear()
        scope.restore()


_parsed = cache(ONNXRegistry.from_torchlib)


def _from_torchlib(*arguments: Any, **named: Any) -> ONNXRegistry:
    """With lists of its own, to which an export adds: torch.onnx parses 500 functions for each file that it writes."""
    registry = copy.copy(_parsed(*arguments, **named))
    registry.functions = {name: [*found] for name, found in registry.functions.items()}
    return registry


def do_once() -> None:
    interpreter._patch_lang = _PatchedOnce()
    # Looks up a thousand operators, a hundred times for each file; those that tests define are there already.
    torch_export._materialize_cpp_cia_ops = cache(torch_export._materialize_cpp_cia_ops)
    ONNXRegistry.from_torchlib = staticmethod(_from_torchlib)  # type: ignore[method-assign]
