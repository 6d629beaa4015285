"""Capture for tests whose subject lies behind it: what was captured and has not changed since is not traced again.

Tracing takes longer than most of what follows. Tests of what tracing makes of a model do not ask for this.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

import export.fusion.program
from export.base.batch import Batch
from export.fusion.capture import Example, capture, check_model

_MOST = 32  # graphs that are kept, each with its weights
_captured: dict[Hashable, fx.GraphModule] = {}


@contextmanager
def captured_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.fusion.program, "capture", captured)
        yield


def captured(model: nn.Module, example: Example, batch: Batch) -> fx.GraphModule:
    """In place of `capture`: the graph there is for a model of the same content, at those sizes, called from there."""
    inputs = [(name, value.shape, value.dtype, value.device) for name, value in check_model(model, example).items()]
    surroundings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    key = batch, tuple(inputs), surroundings, torch.is_autocast_enabled("cpu"), tuple(_content(model))
    if key not in _captured:
        _captured[key] = capture(model, example, batch)
    if len(_captured) > _MOST:
        _captured.pop(next(iter(_captured)))
    return _captured[key]


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal where the value is the same object."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _content(model: nn.Module) -> Iterator[Hashable]:
    for name, module in model.named_modules():
        yield name, type(module)
        for attribute, value in vars(module).items():
            for key, inner in value.items() if isinstance(value, dict) else [(None, value)]:
                yield attribute, key, "a module" if isinstance(inner, nn.Module) else _summary(inner)


def _summary(value: object) -> Hashable:
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return value.shape, value.dtype, value.requires_grad, zlib.crc32(content)
    return repr(value) if isinstance(value, bool | int | float | str | tuple | set | None) else _Same(value)
