"""Small questions that every pass asks of a graph."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, fx

from export.base.batch import INPUT
from kernels.operators.registry import OPERATORS, Arguments

aten = torch.ops.aten
resnet_deploy = torch.ops.resnet_deploy
FUSED_OPERATORS = tuple(getattr(resnet_deploy, name).default for name in OPERATORS)
QUANTISATION = (resnet_deploy.quantize_linear.default, resnet_deploy.dequantize_linear.default)
_T = TypeVar("_T")
_Arguments = TypeVar("_Arguments", bound=Arguments[Any])


def duplicate(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that shares its parameters, so that a pass can stay a pure function."""
    return fx.GraphModule(graph_module, deep_copy(graph_module.graph))


def deep_copy(value: _T, shared: Iterable[Tensor] = ()) -> _T:
    """A copy of a graph, or of a module with its graph and parameters but for those that are `shared`."""
    memo = {id(tensor): tensor for tensor in shared}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of copying the structure of the output
        return copy.deepcopy(value, memo)


NAME = "input"  # key of a placeholder's meta: the parameter of forward that it is, of several


def input_nodes(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """Name of an input -> its node, in the order of forward; the only one is called `input`."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return {INPUT: nodes[0]} if len(nodes) == 1 else {str(node.meta[NAME]): node for node in nodes}


def is_call(node: object, *targets: Callable[..., Any]) -> TypeGuard[fx.Node]:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def parameter(graph_module: fx.GraphModule, node: object) -> Tensor:
    """What a node reads that a pass has made sure is a parameter or buffer."""
    value = constant(graph_module, node)
    assert value is not None, f"{node} is computed"
    return value


def constant(graph_module: fx.GraphModule, node: object) -> Tensor | None:
    """The parameter or buffer that `node` reads, or None where it is computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: object = reduce(getattr, str(node.target).split("."), graph_module)
    return value if isinstance(value, Tensor) else None


def schema_name(node: fx.Node) -> str:
    """The operator a node calls, without its namespace: `conv2d_bias_act`; empty for what is no operator."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else ""


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a call; the operator's schema says their types."""
    return node.args


def named_args(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of an operator under the names its schema gives them, defaults included."""
    target: Any = node.target
    names = target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in names}
    given = {argument.name: value for argument, value in zip(names, node.args, strict=False)}
    return {**defaults, **given, **node.kwargs}


def fused_args(operator: type[_Arguments], node: fx.Node) -> _Arguments:
    """The arguments of a call of a fused operator, as their type."""
    return operator.of(*node.args)


def fused_call(graph: fx.Graph, arguments: Arguments[fx.Node]) -> fx.Node:
    """A call of the fused operator that takes these arguments, at the graph's current insertion point."""
    return graph.call_function(getattr(resnet_deploy, arguments.operator).default, arguments.values())


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, where there is no other and it reads it once."""
    if len(node.users) != 1:
        return None
    reader, reads = next(iter(node.users)), []
    fx.node.map_arg((reader.args, reader.kwargs), lambda n: reads.append(n))
    return reader if reads.count(node) == 1 else None


def pair(values: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a geometry that ATen also takes as one number for both."""
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


_MOVES_DATA = (
    "alias",
    "chunk",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "expand",
    "flip",
    "movedim",
    "narrow",
    "permute",
    "reshape",
    "roll",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "sym_size",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "_assert_tensor_metadata",
)
WEIGHTED = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.linear.default,
)


def moves_data(node: fx.Node) -> bool:
    """Whether a call computes nothing: it moves, names or measures values (dropout, in eval mode, too)."""
    return schema_name(node) in ("", *_MOVES_DATA)


def weighs(node: object) -> TypeGuard[fx.Node]:
    """Whether `node` is a convolution, a linear layer or a fused operator: what may not stay unchecked."""
    return is_call(node, *FUSED_OPERATORS, *WEIGHTED)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """What a node computes from, its parameters and sizes apart."""
    return [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number that follows from the batch size."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def size_at(size: fx.Node | torch.SymInt, batch: int) -> int:
    """The value of such a number for one batch size."""
    number: Any = size.meta["val"] if isinstance(size, fx.Node) else size
    expression = number.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def fits(node: fx.Node, shape: Sequence[int]) -> bool:
    """Whether a value of this shape is one of `node`, in a batch of any size: whichever dimension that is."""
    sizes = node.meta["val"].shape
    if len(sizes) != len(shape):
        return False
    pairs = list(zip(sizes, shape, strict=True))
    batches = {length / size_at(size, 1) for size, length in pairs if isinstance(size, torch.SymInt)}
    return len(batches) < 2 and all(size == length for size, length in pairs if isinstance(size, int))


def computed_by(node: fx.Node) -> fx.Node:
    """The node whose values `node` holds, before they were moved: a result of an operator, one of several maybe."""
    while node.op == "call_function" and moves_data(node) and tensor_inputs(node):
        parent = tensor_inputs(node)[0]
        if is_call(node, operator.getitem) and not moves_data(parent):
            break
        node = parent
    return node


def add_constant(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Store `value` as a buffer under a name derived from `name` and return a node that reads it.

    4-D values, which are convolution weights, become channels_last. The node is inserted at the graph's
    current insertion point.
    """
    base = name.replace(".", "_")
    unique, suffix = base, 0
    while hasattr(graph_module, unique):
        suffix += 1
        unique = f"{base}_{suffix}"
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    graph_module.register_buffer(unique, value.detach().contiguous(memory_format=layout))
    return graph_module.graph.get_attr(unique)


def module_path(node: fx.Node) -> str:
    """The name in the user's model of the module a node comes from, such as `layer1.0.conv1`."""
    paths = _paths(node)
    return paths[-1] if paths else node.name


def _paths(node: fx.Node) -> list[str]:
    """Of the modules that a node comes from, the outermost first, without the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if path and not path.startswith("_empty_nn_module_stack")]


def spoken_name(node: fx.Node) -> str:
    """`module_path`; of what the model's own forward computes, of no module, with the module that it comes behind."""
    near: fx.Node | None = node
    while near is not None and not _paths(near):
        near = next(iter(tensor_inputs(near)), None)
    if near is None or near is node:
        return module_path(node)
    return f"{module_path(node)} (forward, behind {module_path(near)})"


def source_name(node: fx.Node) -> str | None:
    """The node of the captured graph whose value `node` computes, None where it has no counterpart."""
    return node.meta.get("source", node.name)


def copy_meta(new: fx.Node, old: fx.Node) -> None:
    """Let `new` stand for `old`: same value and shape. What `new.meta` already says is kept."""
    inherited = {key: value for key, value in old.meta.items() if key != "refused"}
    new.meta = {**inherited, "source": source_name(old), **new.meta}


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have the same shape and type for every batch size."""
    left, right = a.meta.get("val"), b.meta.get("val")
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    return (
        left.dtype == right.dtype
        and left.dim() == right.dim()
        and all(str(m) == str(n) for m, n in zip(left.shape, right.shape, strict=True))
    )


def first_output(node: fx.Node) -> fx.Node | None:
    """The only result taken from a node that returns several, where that is the first one."""
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], operator.getitem) and users[0].args[1] == 0:
        return users[0]
    return None
