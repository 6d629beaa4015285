"""A fused graph as calls of kernels: which problem is computed on which tensors, in order, for one batch size.

The graph is interpreted on tensors of torch's meta device. They have shapes, strides and storages but no values: what
only moves data is a view of the same storage and costs nothing, and whatever a kernel writes is a new one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from export.base.errors import ExportError
from export.base.normalisation import Normalisation
from export.base.precision import Precision
from export.fusion.capture import plain_torch
from export.fusion.nodes import FUSED_OPERATORS, aten, input_nodes, module_path, moves_data, schema_name
from export.fusion.program import FusedProgram, output_names, returned_tensors
from kernels.between.elementwise import ElementwiseProblem
from kernels.between.pooling import PoolProblem
from kernels.operators.activations import ACTIVATIONS
from kernels.operators.checks import is_channels_last
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.registry import OPERATORS, Arguments
from kernels.problems import KERNEL_DTYPES, Problem

ALIGNMENT = 256  # bytes, of every tensor that is passed by its address
_BINARY = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor), "add"),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), "subtract"),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), "multiply"),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), "divide"),
}


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One problem on tensors of the meta device.

    Attributes:
        node: the node of the fused graph whose value it computes, or helps to.
        layer: the module of the user's model that it comes from.
        tensors: by the names that kernels give them; `y` is what it computes.
    """

    node: str
    layer: str
    problem: Problem
    tensors: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Calls:
    """What a batch size asks of the kernels.

    Attributes:
        calls: in order.
        inputs, outputs: by name, contiguous; float32, inputs also of bytes.
        values: name of a node -> the tensor that it holds; it may be a view of another's.
        weights: storage -> the constant that it holds, as dense memory.
    """

    calls: tuple[KernelCall, ...]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    weights: Mapping[int, Tensor]


def kernel_calls(
    program: FusedProgram,
    graph_module: fx.GraphModule,
    precision: Precision,
    batch: int,
    normalisation: Normalisation | None = None,
) -> Calls:
    """The calls of `graph_module`, which is `program.at(precision)`, for one batch size.

    With a normalisation the inputs are pictures as bytes, [N, H, W, C], and it is the first call.

    Raises:
        ExportError: it has operators that no kernel computes; names them.
    """
    walk = _Walk(graph_module, precision, batch, normalisation)
    with plain_torch():
        outputs = returned_tensors(graph_module, walk.run(*program.inputs))
        names = output_names(graph_module)
        returned = {name: walk.returned(name, y) for name, y in zip(names, outputs, strict=True)}
    if walk.refused:
        raise ExportError(f"no kernel computes {', '.join(dict.fromkeys(walk.refused))}")
    # A storage is known by its address: of one that nothing holds any longer, another tensor may get it.
    read = {storage_of(tensor) for call in walk.calls for tensor in call.tensors.values()}
    weights = {storage: value for storage, value in walk.weights.items() if storage in read}
    return Calls(tuple(walk.calls), walk.inputs, returned, walk.tensors, weights)


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart, as long as the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Open:
    """An element-wise call that one which reads its result may still become part of."""

    call: KernelCall
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


class _Walk(fx.Interpreter):
    """Runs a graph on the meta device and notes what has to be computed."""

    def __init__(
        self, graph_module: fx.GraphModule, precision: Precision, batch: int, normalisation: Normalisation | None
    ) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self._dtype, self._batch, self._normalisation = precision.dtype, batch, normalisation
        self._inputs = {str(node.target): (name, node) for name, node in input_nodes(graph_module).items()}
        self._constants: dict[str, Tensor] = {}
        self._zeros: dict[tuple[int, torch.dtype], Tensor] = {}
        self.calls: list[KernelCall] = []
        self.inputs: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.refused: list[str] = []
        self._open: dict[int, _Open] = {}
        self._node: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "get_attr":
            self.tensors[n.name] = value
        return value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        name, node = self._inputs[str(target)]
        shape = (self._batch, *(int(size) for size in node.meta["val"].shape[1:]))
        super().placeholder(target, args, kwargs)
        if self._normalisation is not None:
            return self._normalised(name, shape, self._normalisation)
        x = self.inputs[name] = torch.empty(shape, device="meta")
        return x if self._dtype == x.dtype else self._copied(x, _empty(x.shape, self._dtype))

    def _normalised(self, name: str, shape: Sequence[int], normalisation: Normalisation) -> Tensor:
        n, c, height, width = shape
        pixels = self.inputs[name] = torch.empty((n, height, width, c), dtype=torch.uint8, device="meta")
        mean, std = (
            self._constant(torch.tensor(values, dtype=torch.float32).reshape(c, 1, 1))
            for values in (normalisation.mean, normalisation.std)
        )
        y = _empty(shape, self._dtype)
        self._elementwise({"a": pixels.permute(0, 3, 1, 2), "b": mean, "c": std, "y": y}, operation="normalise")
        return y

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, Tensor):
            return value
        if target not in self._constants:
            self._constants[str(target)] = self._constant(value)
        return self._constants[str(target)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in FUSED_OPERATORS:
            return self._fused(OPERATORS[target._opname].of(*args, **kwargs))
        result = target(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if {storage_of(y) for y in pytree.tree_leaves(result)} <= {storage_of(x) for x in given}:
            return result
        lowered = self._lowered(target, args, kwargs, result)
        if lowered is None:
            self.refused.append(f"{schema_name(self._node)} ({module_path(self._node)})")
            return result
        return lowered

    def _lowered(self, target: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """What an operator computes or, where it moves data, a view does not hold; None where no kernel can."""
        a = _named(target, args, kwargs)
        activation = _activation(target, a)
        if activation is not None:
            tensors, settings = self._absorbed(a["self"]) or ({"a": a["self"]}, {})
            return self._elementwise({**tensors, "y": _empty(result.shape, result.dtype)}, **settings, **activation)
        if target in _BINARY and a.get("alpha", 1) == 1 and not a.get("rounding_mode"):
            return self._binary(_BINARY[target], a["self"], a["other"], result)
        if target is aten.prelu.default:
            slope = a["weight"].reshape(1, -1, *[1] * (a["self"].dim() - 2))
            tensors = {"a": a["self"], "b": slope, "y": _empty(result.shape, result.dtype)}
            return self._elementwise(tensors, operation="prelu")
        if schema_name(self._node) in ("contiguous", "clone", "_to_copy"):
            return self._copied(a["self"], result) if result.dtype.is_floating_point else None
        if moves_data(self._node) and schema_name(self._node) in ("reshape", "flatten", "view"):
            dense = self._copied(args[0], torch.empty(args[0].shape, dtype=args[0].dtype, device="meta"))
            return target(dense, *args[1:], **kwargs)
        operators: dict[Any, Callable[[dict[str, Any], Any], Any]] = {
            aten.cat.default: self._cat,
            aten.mean.dim: self._mean,
            aten.avg_pool2d.default: self._avg_pool,
            aten.max_pool2d.default: self._max_pool,
            aten.adaptive_avg_pool2d.default: self._adaptive_pool,
            aten.linear.default: self._linear,
            aten.conv1d.default: self._conv1d,
        }
        return operators[target](a, result) if target in operators else None

    def returned(self, name: str, value: Tensor) -> Tensor:
        """An output as it is read: float32, contiguous, alone in its storage."""
        self._node = next(node for node in self.module.graph.nodes if node.op == "output")  # type: ignore[union-attr]
        held = {*map(storage_of, self.inputs.values()), *self.weights}
        y = torch.empty(value.shape, device="meta")
        whole = value.dtype == y.dtype and value.stride() == y.stride() and value.storage_offset() == 0
        return value if whole and storage_of(value) not in held else self._copied(value, y)

    def _call(self, problem: Problem, tensors: Mapping[str, Tensor]) -> None:
        self.calls.append(KernelCall(self._node.name, module_path(self._node), problem, tensors))

    def _fused(self, arguments: Arguments[Tensor]) -> Tensor:
        arguments = arguments.map(self._addressable)
        arguments.check(KERNEL_DTYPES)
        problem = arguments.problem()
        y = _empty(problem.out_shape, problem.dtype)
        self._call(problem, {**arguments.operands(), "y": y})
        return y

    def _addressable(self, x: Tensor) -> Tensor:
        """x, or a copy of it where a kernel could not be given its address or its layout."""
        dense = is_channels_last(x) if x.dim() == 4 else x.is_contiguous()
        if dense and x.storage_offset() * x.itemsize % ALIGNMENT == 0:
            return x
        return self._copied(x, _empty(x.shape, x.dtype))

    def _elementwise(self, tensors: Mapping[str, Tensor], **settings: Any) -> Tensor | None:
        dtypes = (*KERNEL_DTYPES, torch.uint8) if settings.get("operation") == "normalise" else KERNEL_DTYPES
        if not all(tensor.dtype in dtypes for tensor in tensors.values()):
            return None
        try:
            problem = ElementwiseProblem.of(tensors, **settings)
        except ValueError:
            return None
        self._call(problem, {name: _whole(tensor) for name, tensor in tensors.items()})
        if "activation" not in settings and settings.get("operation") != "normalise":
            self._open[storage_of(tensors["y"])] = _Open(self.calls[-1], tensors, settings)
        return tensors["y"]

    def _absorbed(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, settings) of the element-wise call that computes x for this node alone, which is taken back."""
        found = self._open.get(storage_of(x))
        readers = [n.users for n in self._node.all_input_nodes if self.env.get(n) is x]
        if found is None or found.tensors["y"] is not x or [len(users) for users in readers] != [1]:
            return None
        self.calls.remove(found.call)
        return {name: tensor for name, tensor in found.tensors.items() if name != "y"}, dict(found.settings)

    def _copied(self, x: Tensor, y: Tensor) -> Tensor:
        """y, which gets the values of x; where no kernel can, that is noted."""
        if self._elementwise({"a": x, "y": y}) is None:
            self.refused.append(f"a copy ({module_path(self._node)})")
        return y

    def _binary(self, operation: str, left: Any, right: Any, result: Tensor) -> Tensor | None:
        tensors = {"a": left, "y": _empty(result.shape, result.dtype)}
        if isinstance(right, Tensor):
            for one, other in ((left, right), (right, left)):
                if operation == "add" and one is not other and self._is_product(one, result):
                    factors, settings = self._absorbed(one) or ({}, {})
                    if factors:
                        return self._elementwise({**factors, "c": other, "y": tensors["y"]}, **settings)
            return self._elementwise({**tensors, "b": right}, operation=operation)
        return self._elementwise(tensors, operation=operation, number=float(right))

    def _is_product(self, x: Any, result: Tensor) -> bool:
        """Whether x is a product of two tensors to which a third can be added by the same kernel."""
        found = self._open.get(storage_of(x)) if isinstance(x, Tensor) and x.shape == result.shape else None
        return found is not None and found.settings.get("operation") == "multiply" and "c" not in found.tensors

    def _cat(self, a: dict[str, Any], result: Tensor) -> Tensor | None:
        y, first, axis = _empty(result.shape, result.dtype), 0, a["dim"] % result.dim()
        for x in a["tensors"]:
            self._copied(x, y.narrow(axis, first, x.shape[axis]))
            first += x.shape[axis]
        return y

    def _mean(self, a: dict[str, Any], result: Tensor) -> Tensor | None:
        x = a["self"]
        if x.dim() != 4 or sorted(axis % 4 for axis in a["dim"]) != [2, 3]:
            return None
        y = self._pool(x, (1, 1), (x.shape[2], x.shape[3]))
        return y if a["keepdim"] else y.flatten(1)

    def _avg_pool(self, a: dict[str, Any], result: Tensor) -> Tensor:
        kernel = _pair(a["kernel_size"])
        return self._pool(
            a["self"],
            result.shape[2:],
            kernel,
            stride=_pair(a["stride"] or kernel),
            padding=_pair(a["padding"]),
            counts_padding=a["count_include_pad"],
            divisor=a["divisor_override"] or 0,
        )

    def _max_pool(self, a: dict[str, Any], result: Tensor) -> Tensor:
        kernel = _pair(a["kernel_size"])
        return self._pool(
            a["self"],
            result.shape[2:],
            kernel,
            stride=_pair(a["stride"] or kernel),
            padding=_pair(a["padding"]),
            dilation=_pair(a["dilation"]),
            maximum=True,
        )

    def _adaptive_pool(self, a: dict[str, Any], result: Tensor) -> Tensor:
        sizes, out = a["self"].shape[2:], result.shape[2:]
        most = [max(-(-(i + 1) * n // k) - i * n // k for i in range(k)) for n, k in zip(sizes, out, strict=True)]
        return self._pool(a["self"], out, (most[0], most[1]), adaptive=True)

    def _pool(self, x: Tensor, out: Sequence[int], kernel: tuple[int, int], **settings: Any) -> Tensor:
        x = self._addressable(x)
        n, c, height, width = x.shape
        problem = PoolProblem(n, c, height, width, int(out[0]), int(out[1]), kernel, dtype=x.dtype, **settings)
        y = _empty(problem.out_shape, x.dtype)
        self._call(problem, {"x": x, "y": y})
        return y

    def _linear(self, a: dict[str, Any], result: Tensor) -> Tensor | None:
        x, weight = a["input"], a["weight"]
        if x.dim() != 2 or storage_of(weight) not in self.weights:
            return None
        x, weight = (tensor.reshape(*tensor.shape, 1, 1) for tensor in (x, weight))
        return self._fused(Conv2dBiasAct(x, weight, self._bias(a["bias"], weight))).flatten(1)

    def _conv1d(self, a: dict[str, Any], result: Tensor) -> Tensor | None:
        """A convolution of pictures of one row."""
        weight = self.weights.get(storage_of(a["weight"]))
        if weight is None or a["input"].dim() != 3:
            return None
        packed = self._constant(weight.unsqueeze(2).contiguous(memory_format=torch.channels_last))
        (stride,), (padding,), (dilation,) = a["stride"], a["padding"], a["dilation"]
        arguments = Conv2dBiasAct(
            a["input"].unsqueeze(2),
            packed,
            self._bias(a["bias"], packed),
            stride=(1, stride),
            padding=(0, padding),
            dilation=(1, dilation),
            groups=a["groups"],
        )
        return self._fused(arguments).squeeze(2)

    def _bias(self, bias: Tensor | None, weight: Tensor) -> Tensor:
        if bias is not None:
            return bias
        key = (weight.shape[0], weight.dtype)
        if key not in self._zeros:
            self._zeros[key] = self._constant(torch.zeros(key[0], dtype=key[1]))
        return self._zeros[key]

    def _constant(self, value: Tensor) -> Tensor:
        """A tensor that stands for a constant."""
        value = value.detach()
        if not (value.dim() == 4 and is_channels_last(value)):
            value = value.contiguous()
        held = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        self.weights[storage_of(held)] = value
        return held


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(*shape, dtype=dtype, device="meta", memory_format=layout)


def _whole(tensor: Tensor) -> Tensor:
    """The storage of a tensor, of which an element-wise kernel knows where the tensor begins."""
    storage = tensor.untyped_storage()
    return tensor.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[-1])


def _named(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of an operator by name, defaults included; none of what is no operator."""
    if not isinstance(target, torch._ops.OpOverload) or target is operator.getitem:
        return {}
    names = target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in names}
    return {**defaults, **{argument.name: value for argument, value in zip(names, args, strict=False)}, **kwargs}


def _activation(target: Any, a: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a problem for an activation of one tensor, None where it is none."""
    if target in (aten.relu.default, aten.relu_.default):
        return {"activation": "relu"}
    if target is aten.hardtanh.default:
        return {"activation": "relu6"} if (a["min_val"], a["max_val"]) == (0, 6) else None
    if target is aten.leaky_relu.default:
        return {"activation": "leaky_relu", "negative_slope": float(a["negative_slope"])}
    if target is aten.gelu.default:
        return {"activation": "gelu_tanh" if a["approximate"] == "tanh" else "gelu"}
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""
    return (
        {"activation": name} if name in ACTIVATIONS and target._overloadname == "default" and name != "prelu" else None
    )
