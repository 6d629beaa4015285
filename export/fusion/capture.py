"""Capture: an nn.Module becomes a functional graph of ATen operators with a dynamic batch."""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from export.base.batch import Batch
from export.base.errors import ExportError, first_line
from export.fusion.any_batch import drops_single, fold_created, for_any_batch, refuse_random
from export.fusion.unwrapping import inner_module, plain_outputs, unwrapped


@contextmanager
def plain_torch() -> Iterator[None]:
    """No gradients, no ambient autocast or inference mode, float32 as the default type."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(default_dtype)


def eager_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` on the CPU in `dtype`, in eval mode; `model` itself is left as it was.

    It is the module inside torch.compile and DataParallel, and returns what `plain_outputs` makes of its outputs.

    Raises:
        ExportError: the model cannot be copied, or is TorchScript.
    """
    model = unwrapped(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in _tensors(vars(module)):
            if isinstance(value, FakeTensor | FunctionalTensor):  # a hook that keeps features kept capture's
                memo[id(value)] = None
            elif value.grad_fn is not None:  # old-style weight_norm, or what a hook kept; torch does not copy it
                memo[id(value)] = value.detach().clone()
    try:
        with torch.inference_mode(False):
            duplicate = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ExportError(f"the model cannot be copied: {first_line(error)}") from error
    for module in list(duplicate.modules()):
        if module._compiled_call_impl is not None:  # what Module.compile() left
            module._compiled_call_impl = None
        for name, child in list(module.named_children()):
            if inner_module(child) is not child:
                setattr(module, name, inner_module(child))
    duplicate.register_forward_hook(lambda module, inputs, outputs: plain_outputs(outputs))
    return duplicate.to(device="cpu", dtype=dtype)


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a value, and in lists, tuples and dictionaries of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def check_model(model: nn.Module, example: Tensor) -> None:
    """Refuse what cannot be exported before any work is done.

    Raises:
        ExportError: not a module, in training mode, not a 4-D floating-point example, a parameter or
            buffer with NaN or Inf, a negative running variance.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ExportError(
            f"expected a model in eval mode, got {', '.join(training[:3])} in training mode: call .eval()"
        )
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        raise ExportError(
            f"expected an example of shape [N, C, H, W] in floating point, got {describe_value(example)}"
            + (": give it as the model is fed, normalised" if isinstance(example, Tensor) else "")
        )
    with plain_torch():  # what inference mode made takes no part in autograd
        _check_tensors(model)


def _check_tensors(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ExportError(f"{name} holds no values yet: call the model on an example first, as lazy modules need")
        if tensor.is_meta:
            raise ExportError(f"{name} holds no values: expected a model with its weights loaded")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name} holds NaN or Inf: expected finite weights")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise ExportError(f"{name} holds {tensor.min().item():.3g}: a variance cannot be negative")


def capture(model: nn.Module, example: Tensor, batch: Batch) -> fx.GraphModule:
    """Trace `model` into a functional float32 graph on the CPU.

    Args:
        model: in eval mode; it is copied, never changed.
        example: [N, C, H, W]; its channels and image size become static, its values do not matter.
        batch: the batch sizes the graph must accept.

    Returns:
        A graph of ATen calls without in-place operators. Parameters keep their names, nodes the name of
        the module they come from (`nn_module_stack`), and calling it returns what `plain_outputs` makes of what the
        model returns. `meta[any_batch.NOTES]` says where it differs.

    Raises:
        ExportError: the model is refused by `check_model` or by torch.export (data- or shape-dependent
            control flow, a batch size fixed in the code, a buffer changed by the forward pass), or draws random
            numbers.
    """
    check_model(model, example)
    size = batch.minimum if batch.static else max(2, min(batch.optimum, batch.maximum))
    _, *shape = example.shape
    traced_input = torch.zeros(size, *shape, dtype=torch.float32)
    dynamic = None if batch.static else ({0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)},)
    with plain_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        duplicate = eager_copy(model, torch.float32)
        program = _exported(duplicate, traced_input, dynamic, type(unwrapped(model)).__name__)
        mutated = list(program.graph_signature.buffers_to_mutate.values())
        if mutated:
            raise ExportError(f"forward changes the buffer {mutated[0]}: expected a pure function of its input")
        if program.graph_signature.user_inputs_to_mutate:
            raise ExportError("forward changes its input in place: expected a pure function of its input")
        graph_module = program.module(check_guards=False)
        lists = duplicate.named_parameters(remove_duplicate=False), duplicate.named_buffers(remove_duplicate=False)
        own = {name for names in lists for name, _ in names}
        refuse_random(graph_module)
        if size == 1 and any(drops_single(node) for node in graph_module.graph.nodes):
            with suppress(ExportError):  # where it also takes two images, one is no special case
                return capture(model, example, Batch(1, 2, 2))
        return for_any_batch(fold_created(graph_module, own))


def _exported(model: nn.Module, x: Tensor, dynamic: Any, name: str) -> torch.export.ExportedProgram:
    """What torch.export makes of `model`, without in-place operators.

    It runs the Python of forward, in which len(x) and int(x.shape[0]) are numbers: where those fix the batch size, it
    reads the bytecode instead, which knows them for the batch size.
    """
    reason, cause = "", None
    for strict in (False, True):
        try:
            with _no_logs():
                program = torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=strict)
                return program.run_decompositions({})  # no decomposition: only in-place operators go
        except ExportError:
            raise
        except Exception as error:  # whatever torch or the user's code raises
            if "specialized it to be a constant" not in str(error):
                reason, cause = reason or first_line(error), cause or error
                break
            reason, cause = _fixed_batch(model, x), error
            if reason:
                break
            reason = (
                "forward takes the images of a batch one by one, as for image in x and range(x.shape[0]) do: expected "
                f"operators on the whole batch; or export one size alone, ExportConfig.batch={len(x)}"
            )
    raise ExportError(f"torch.export cannot capture {name}: {reason}") from cause


@contextmanager
def _no_logs() -> Iterator[None]:
    """Without what torch logs, a page long, of an error that is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _fixed_batch(model: nn.Module, x: Tensor) -> str:
    """What to say of a model that only takes the batch size it was traced with; empty where it takes others."""
    try:
        model(torch.zeros(len(x) + 1, *x.shape[1:]))
    except Exception as error:  # whatever the user's code raises
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        where = ""
        if own and own[-1].filename != __file__:
            where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {str(own[-1].line)[:60]})"
        return (
            f"forward takes no other batch than {len(x)}{where}: expected x.shape[0] or -1 where it has a number, as "
            f"in view({len(x)}, -1) or zeros({len(x)}, ...); or export that size alone, ExportConfig.batch={len(x)}"
        )
    return ""


def describe_value(value: object) -> str:
    """Shape and type of a tensor, the type of anything else."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
