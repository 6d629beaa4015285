"""Capture: an nn.Module becomes a functional graph of ATen operators with a dynamic batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from export.base.batch import Batch
from export.base.errors import ExportError, first_line
from export.fusion.nodes import args_of, aten, is_call


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

    Raises:
        ExportError: the model cannot be copied (old-style weight_norm, for one).
    """
    try:
        duplicate = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ExportError(f"the model cannot be copied: {first_line(error)}") from error
    return duplicate.to(device="cpu", dtype=dtype)


def check_model(model: nn.Module, example: Tensor) -> None:
    """Refuse what cannot be exported before any work is done.

    Raises:
        ExportError: not a module, in training mode, not a 4-D floating-point example, a parameter or
            buffer with NaN or Inf, a negative running variance.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"expected a torch.nn.Module, got {type(model).__name__}")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ExportError(
            f"expected a model in eval mode, got {', '.join(training[:3])} in training mode: call .eval()"
        )
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        raise ExportError(f"expected an example of shape [N, C, H, W] in floating point, got {describe_value(example)}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
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
        the module they come from (`nn_module_stack`), and calling it returns what the model returns.

    Raises:
        ExportError: the model is refused by `check_model` or by torch.export (data- or shape-dependent
            control flow, a batch size fixed in the code, a buffer changed by the forward pass).
    """
    check_model(model, example)
    size = batch.minimum if batch.static else max(2, min(batch.optimum, batch.maximum))
    _, *shape = example.shape
    traced_input = torch.zeros(size, *shape, dtype=torch.float32)
    dynamic = None if batch.static else ({0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)},)
    with plain_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        duplicate = eager_copy(model, torch.float32)
        try:
            program = torch.export.export(duplicate, (traced_input,), dynamic_shapes=dynamic, strict=False)
            program = program.run_decompositions({})  # no decomposition: only in-place operators go
        except Exception as error:
            raise ExportError(f"torch.export cannot capture {type(model).__name__}: {first_line(error)}") from error
        mutated = list(program.graph_signature.buffers_to_mutate.values())
        if mutated:
            raise ExportError(f"forward changes the buffer {mutated[0]}: expected a pure function of its input")
        if program.graph_signature.user_inputs_to_mutate:
            raise ExportError("forward changes its input in place: expected a pure function of its input")
        graph_module = program.module(check_guards=False)
    return _without_layout(graph_module)


_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def _without_layout(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Free the graph of the memory layout and batch size it was traced with.

    view(x, [batch, ...]) becomes reshape(x, [-1, ...]), which any layout allows and which lowers to one
    Reshape of constant shape; as_strided reads an input laid out as it was traced.
    """
    for node in graph_module.graph.nodes:
        if is_call(node, *_VIEWS):
            shape = list(args_of(node)[1])
            symbolic = [i for i, length in enumerate(shape) if isinstance(length, fx.Node)]
            if len(symbolic) == 1 and -1 not in shape:
                shape[symbolic[0]] = -1
            node.target = aten.reshape.default
            node.args = (node.args[0], shape)
        elif is_call(node, aten.as_strided.default):
            with graph_module.graph.inserting_before(node):
                traced = graph_module.graph.call_function(aten.contiguous.default, (node.args[0],))
            traced.meta = dict(args_of(node)[0].meta)
            node.replace_input_with(args_of(node)[0], traced)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def describe_value(value: object) -> str:
    """Shape and type of a tensor, the type of anything else."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
