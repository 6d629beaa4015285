"""Capture: an nn.Module becomes a functional graph of ATen operators with a dynamic batch."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true
from torch.overrides import TorchFunctionMode

from export.base.batch import INPUT, Batch
from export.base.errors import ExportError, first_line
from export.fusion.any_batch import drops_single, fold_created, for_any_batch, refuse_random
from export.fusion.functional import made_functional
from export.fusion.nodes import NAME, input_nodes
from export.fusion.unwrapping import inner_module, plain_outputs, unwrapped

Example = Tensor | Mapping[str, Tensor]
_T = TypeVar("_T")
_META = re.compile(r"^meta_(?=\.|$)")  # as `_rename_meta` calls it
_CUTS: tuple[Any, ...] = (torch.chunk, Tensor.chunk, torch.split, Tensor.split)
_MOST_PARTS = 17
_TORCH = str(Path(torch.__file__).parent)
_LONGEST_LINE = 60


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


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: tracing makes a million objects, all of which it would look at many times over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def eager_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` on the CPU in `dtype`, in eval mode, that returns what `plain_outputs` makes of its outputs.

    Raises:
        ExportError: as `copied`.
    """
    duplicate = copied(model, dtype)
    duplicate.register_forward_hook(lambda module, inputs, outputs: plain_outputs(outputs))
    return duplicate.to(device="cpu", dtype=dtype)


def copied(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the module inside torch.compile and DataParallel; `model` itself is left as it was.

    With `dtype` its floating-point parameters are cast to it on the CPU, and not copied first.

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
    for value in model.parameters() if dtype is not None else ():
        if type(value) is nn.Parameter and value.is_floating_point() and id(value) not in memo:
            with torch.inference_mode(False):
                cast = value.detach().to("cpu", dtype, copy=True)
                memo[id(value)] = nn.Parameter(cast, value.requires_grad)
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
    return duplicate


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a value, and in lists, tuples and dictionaries of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def check_model(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """Refuse what cannot be exported before any work is done; the example by the names of its inputs, in their order.

    Raises:
        ExportError: not a module, in training mode, not a 4-D floating-point example nor several by the names of
            forward's parameters, a parameter or buffer with NaN or Inf, a negative running variance.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ExportError(
            f"expected a model in eval mode, got {', '.join(training[:3])} in training mode: call .eval()"
        )
    inputs = _named_inputs(model, example)
    with plain_torch():  # what inference mode made takes no part in autograd
        _check_tensors(model)
    return inputs


def _named_inputs(model: nn.Module, example: object) -> dict[str, Tensor]:
    parameters, required, any_name = _parameters(model)
    if isinstance(example, Mapping) and len(example) == 1 and list(example) == parameters[:1]:
        example = next(iter(example.values()))
    if not isinstance(example, Mapping):
        if isinstance(example, Tensor) and len(required) > 1:
            names = ", ".join(f"{name!r}: ..." for name in required)
            raise ExportError(f"forward takes {', '.join(required)}: expected an example of each by name, {{{names}}}")
        if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
            advice = "give it as the model is fed, normalised"
            if isinstance(example, Tensor) and example.dtype == torch.uint8:
                advice += "; ExportConfig.input='uint8' is for artefacts that take bytes"
            if not isinstance(example, Tensor):
                advice = "several inputs are given by the names of forward's parameters"
            raise ExportError(
                f"expected an example of shape [N, C, H, W] in floating point, got {describe_value(example)}: {advice}"
            )
        return {INPUT: example}
    unknown = [name for name in example if name not in parameters and not (any_name and isinstance(name, str))]
    missing = [name for name in required if name not in example]
    if unknown or missing or len(example) < 2:
        expected = ", ".join(parameters) or "no input that can be given by name"
        raise ExportError(
            f"expected examples by the names of forward's parameters, {expected}: got "
            f"{', '.join(map(str, example)) or 'none'}" + (f", without {', '.join(missing)}" if missing else "")
        )
    for name, value in example.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point():
            raise ExportError(
                f"expected an example of {name} of shape [N, ...] in floating point, got {describe_value(value)}"
            )
    if len({len(value) for value in example.values()}) > 1:
        counts = ", ".join(f"{len(value)} of {name}" for name, value in example.items())
        raise ExportError(f"expected examples with the same batch dimension first, got {counts}")
    order = [*parameters, *example]
    return dict(sorted(example.items(), key=lambda item: order.index(item[0])))


def _parameters(model: nn.Module) -> tuple[list[str], list[str], bool]:
    """Of forward: the parameters that can be given by name, those that must be given, and whether any name will do."""
    try:
        found = list(inspect.signature(model.forward, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # of no Python function
        found = []
    by_name = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return (
        [p.name for p in by_name],
        [p.name for p in by_name if p.default is p.empty],
        any(p.kind is p.VAR_KEYWORD for p in found),
    )


def call_arguments(inputs: Mapping[str, _T]) -> tuple[tuple[_T, ...], dict[str, _T]]:
    """How forward is called: its only input by position, several by their names."""
    return (tuple(inputs.values()), {}) if list(inputs) == [INPUT] else ((), dict(inputs))


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


def capture(model: nn.Module, example: Example, batch: Batch) -> fx.GraphModule:
    """Trace `model` into a functional float32 graph on the CPU.

    Args:
        model: in eval mode; it is copied, never changed.
        example: [N, C, H, W], or several inputs by the names of forward's parameters, [N, ...] each; all sizes but
            the batch become static, its values do not matter.
        batch: the batch sizes the graph must accept.

    Returns:
        A graph of ATen calls without in-place operators. Parameters keep their names, nodes the name of the module they
        come from (`nn_module_stack`), inputs theirs (`input_nodes`), and calling it returns what `plain_outputs` makes
        of what the model returns. `meta[any_batch.NOTES]` says where it differs.

    Raises:
        ExportError: the model is refused by `check_model` or by torch.export (data- or shape-dependent
            control flow, a batch size fixed in the code, a buffer changed by the forward pass), draws random
            numbers, or returns nothing that follows from one of several inputs.
    """
    inputs = check_model(model, example)
    size = batch.minimum if batch.static else max(2, min(batch.optimum, batch.maximum))
    dim = None if batch.static else {0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)}
    dynamic: Any = None if dim is None else (dim,) if list(inputs) == [INPUT] else dict.fromkeys(inputs, dim)
    with plain_torch(), uncollected(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        duplicate = eager_copy(model, torch.float32)
        renamed = _rename_meta(duplicate)
        duplicate.register_forward_pre_hook(_one_batch, with_kwargs=True)
        graph_module = _exported(duplicate, inputs, size, dynamic, type(unwrapped(model)).__name__)
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        for name, node in zip(inputs, placeholders, strict=True):
            node.meta[NAME] = name
        for node in graph_module.graph.nodes if renamed else ():
            stack = node.meta.get("nn_module_stack") or {}
            for key, (path, kind) in stack.items():
                stack[key] = (_META.sub("meta", path), kind)
        lists = duplicate.named_parameters(remove_duplicate=False), duplicate.named_buffers(remove_duplicate=False)
        own = {name for names in lists for name, _ in names}
        refuse_random(graph_module)
        if size == 1 and any(drops_single(node) for node in graph_module.graph.nodes):
            with suppress(ExportError):  # where it also takes two images, one is no special case
                return capture(model, example, Batch(1, 2, 2))
        graph_module = for_any_batch(fold_created(graph_module, own))
        _refuse_unused(graph_module)
        return graph_module


def _rename_meta(model: nn.Module) -> bool:
    """Give a module called `meta` another name, beside its own: a captured graph has an attribute of that name."""
    if "meta" not in model._modules:
        return False
    model.__dict__["meta"] = model._modules["meta_"] = model._modules.pop("meta")
    return True


class _ExactParts(TorchFunctionMode):
    """Cuts images that were stacked along the batch apart by slices.

    Of chunk and split torch.export cannot tell how many parts a batch of any size makes.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        if func in _CUTS and len(args) > 1 and dim == 0 and isinstance(args[0].shape[0], torch.SymInt):
            x, by = args[:2]
            size: Any = x.shape[0] // by if "chunk" in func.__name__ else by
            for count in range(2, _MOST_PARTS):
                if not isinstance(by, list | tuple) and statically_known_true(x.shape[0] == count * size):
                    return tuple(x[i * size : (i + 1) * size] for i in range(count))
        return func(*args, **kwargs)


def _one_batch(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    """Before forward: all inputs have the same batch size, by whatever symbol torch.export knows that of each."""
    first, *others = (x.shape[0] for x in (*args, *kwargs.values()))
    for size in others:
        torch._check(size == first)


def _refuse_unused(graph_module: fx.GraphModule) -> None:
    """Raises ExportError where nothing follows from one of several inputs; runtimes drop such an input."""
    inputs = input_nodes(graph_module)
    for name, node in inputs.items():
        if len(inputs) > 1 and not node.users:
            raise ExportError(f"forward does not use {name}: expected inputs that what it returns follows from")


def _exported(model: nn.Module, inputs: Mapping[str, Tensor], size: int, dynamic: Any, name: str) -> fx.GraphModule:
    """What torch.export makes of `model`, without in-place operators.

    It runs the Python of forward, in which len(x) and int(x.shape[0]) are numbers: where those fix the batch size, it
    reads the bytecode instead, which knows them for the batch size.
    """
    reason, cause = "", None
    args, kwargs = call_arguments(_zeros(inputs, size))
    for strict in (False, True):
        try:
            with _no_logs(), nullcontext() if strict else _ExactParts(), _no_decisions(model, name):
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=strict)
            graph_module = program.module(check_guards=False)
            if made_functional(graph_module):
                return graph_module
            with _no_logs():
                program = program.run_decompositions({})  # no decomposition: only in-place operators go
            mutated = list(program.graph_signature.buffers_to_mutate.values())
            if mutated:
                raise ExportError(f"forward changes the buffer {mutated[0]}: expected a pure function of its input")
            if program.graph_signature.user_inputs_to_mutate:
                raise ExportError("forward changes its input in place: expected a pure function of its input")
            return program.module(check_guards=False)
        except ExportError:
            raise
        except Exception as error:  # whatever torch or the user's code raises
            if "specialized it to be a constant" not in str(error):
                reason, cause = reason or f"{first_line(error)}{_where(error)}", cause or error
                break
            reason, cause = _fixed_batch(model, inputs, size), error
            if reason:
                break
            reason = (
                "forward takes the images of a batch one by one, as for image in x and range(x.shape[0]) do: expected "
                f"operators on the whole batch; or export one size alone, ExportConfig.batch={size}"
            )
    raise ExportError(f"torch.export cannot capture {name}: {reason}") from cause


@contextmanager
def _no_decisions(model: nn.Module, name: str) -> Iterator[None]:
    """Refuse the branch that a value decides where it is: from further out torch prints what it has traced so far."""
    forward, own = model.forward, vars(model).get("forward")

    @functools.wraps(forward)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except GuardOnDataDependentSymNode as error:
            raise ExportError(
                f"torch.export cannot capture {name}: what forward does depends on the values of a tensor"
                f"{_where(error)}: expected the same operators for every input, as torch.where has for a choice"
            ) from error

    vars(model)["forward"] = refusing
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def _where(error: BaseException) -> str:
    """The last line that is not torch's, nor of this file, of what raised an error; empty where there is none."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.line and frame.filename != __file__ and not frame.filename.startswith(_TORCH):
            found = f" ({Path(frame.filename).name}, line {frame.lineno}: {frame.line[:_LONGEST_LINE]})"
    return found


@contextmanager
def _no_logs() -> Iterator[None]:
    """Without what torch logs, a page long, of an error that is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _zeros(inputs: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    return {name: torch.zeros(size, *x.shape[1:], dtype=torch.float32) for name, x in inputs.items()}


def _fixed_batch(model: nn.Module, inputs: Mapping[str, Tensor], size: int) -> str:
    """What to say of a model that only takes the batch size it was traced with; empty where it takes others."""
    args, kwargs = call_arguments(_zeros(inputs, size + 1))
    try:
        model(*args, **kwargs)
    except Exception as error:  # whatever the user's code raises
        return (
            f"forward takes no other batch than {size}{_where(error)}: "
            "expected x.shape[0] or -1 where it has a number, as in "
            f"view({size}, -1) or zeros({size}, ...); or export that size alone, ExportConfig.batch={size}"
        )
    return ""


def describe_value(value: object) -> str:
    """Shape and type of a tensor, the type of anything else."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
