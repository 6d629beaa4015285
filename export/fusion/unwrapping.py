"""What stands around a user's network: wrappers outside, and the containers that it returns its tensors in."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.base.errors import ExportError

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel, DistributedDataParallel and AveragedModel.

    Raises:
        ExportError: the module, or one within it, is TorchScript.
    """
    model = inner_module(model)
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ExportError(
                    f"{name or 'the model'} is TorchScript, which cannot be captured: expected the nn.Module that it "
                    "was scripted or traced from; build that and load torch.jit.load(...).state_dict() into it"
                )
    return model


def inner_module(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel, DistributedDataParallel and AveragedModel, however many."""
    while type(model).__name__ in _WRAPPERS and type(model).__module__.startswith("torch."):
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def with_softmax(model: nn.Module) -> nn.Module:
    """The module with a softmax over the classes behind it; it shares all else with `model`, which is left as it was.

    Raises:
        ExportError: what the module returns is no [N, classes], said when it is called.
    """
    duplicate = copy.copy(unwrapped(model))
    duplicate._forward_hooks = duplicate._forward_hooks.copy()
    duplicate.register_forward_hook(_softmax)
    return duplicate


def _softmax(module: nn.Module, inputs: object, outputs: object) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        found = f"of shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ExportError(
            f"ExportConfig.outputs='probabilities': expected a model that returns [N, classes], got {found}"
        )
    return outputs.softmax(1)


def plain_outputs(outputs: object) -> object:
    """What a model returns, in the containers that torch.export takes; tensors and what no file holds are as they were.

    Raises:
        ExportError: something that is no tensor, container, number, string or None.
    """
    if outputs is None or isinstance(outputs, (Tensor, bool, int, float, str, torch.SymInt, torch.SymFloat)):
        return outputs
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, (Mapping, type)):
        outputs = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        kind = OrderedDict if type(outputs) is OrderedDict else dict
        return kind((key, plain_outputs(value)) for key, value in outputs.items())
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        fields: Any = map(plain_outputs, outputs)
        return type(outputs)(*fields)
    if isinstance(outputs, (tuple, list)):
        return (list if isinstance(outputs, list) else tuple)(map(plain_outputs, outputs))
    if isinstance(outputs, (torch.dtype, torch.device, enum.Enum, bytes, set, frozenset, np.generic, range)):
        return None  # beside tensors these only inform
    raise ExportError(
        f"the model returns a {type(outputs).__name__}: expected tensors, or tuples, lists, dictionaries or "
        "dataclasses of them"
    )
