"""Fuse conv -> (add) -> (activation) into one `conv2d_bias_act`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from export.fusion.nodes import (
    add_constant,
    args_of,
    aten,
    constant,
    copy_meta,
    duplicate,
    fused_call,
    is_call,
    module_path,
    named_args,
    only_reader,
    pair,
    parameter,
    same_shape,
    schema_name,
    source_name,
)
from export.fusion.passes.name_activations import is_relu6
from kernels.operators.conv2d_bias_act import Conv2dBiasAct

_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
_WITHOUT_ARGUMENTS = (aten.hardsigmoid.default, aten.hardswish.default, aten.sigmoid.default, aten.silu.default)


def fuse_epilogue(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace every 2-D convolution with constant parameters by the fused operator.

    A following addition joins it where the convolution has no other reader and the other summand has
    the same shape (no broadcasting, no alpha); a ReLU or one of `ACTIVATIONS` joins where the value before it has no
    other reader. Of two convolutions that are added, the one that has its input to itself, which a shortcut has not,
    takes the other as its residual; else the left summand does. A gate, a product with what is computed for each
    channel or for each pixel, stays and says so.
    """
    graph_module = duplicate(graph_module)
    for conv in list(graph_module.graph.nodes):
        if is_call(conv, aten.mul.Tensor) and (gate := _gate(conv)):
            conv.meta["refused"] = gate
        if not is_call(conv, *_CONVOLUTIONS):
            continue
        arguments, reason = _arguments(graph_module, conv)
        if arguments is None:
            conv.meta["refused"] = reason
            continue
        _replace(graph_module, conv, arguments)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _replace(graph_module: fx.GraphModule, conv: fx.Node, arguments: Conv2dBiasAct[Any]) -> None:
    chain, residual = [conv], None
    addition = only_reader(conv)
    if addition is not None and (residual := _other_summand(addition, conv)) is not None:
        chain.append(addition)
    before, activation = chain[-1], only_reader(chain[-1])
    act = {} if activation is None else _activation(graph_module, activation, before)
    if activation is not None and act:
        chain.append(activation)
    graph, last = graph_module.graph, chain[-1]
    with graph.inserting_before(last):
        if arguments.bias is None:
            weight = parameter(graph_module, arguments.weight)
            zeros = add_constant(graph_module, f"{module_path(conv)}.bias", weight.new_zeros(weight.shape[0]))
            arguments = replace(arguments, bias=zeros)
        if "slope" in act:
            slope = parameter(graph_module, act["slope"]).expand(before.meta["val"].shape[1])
            act["slope"] = add_constant(graph_module, f"{module_path(last)}.weight", slope)
        fused = fused_call(graph, replace(arguments, residual=residual, **act))
    name = module_path(conv)
    parts = [*conv.meta.get("fused", [name]), *(module_path(node) for node in chain[1:])]
    weights = {"weight": name, "bias": name} | ({"slope": module_path(last)} if "slope" in act else {})
    fused.meta = {
        "nn_module_stack": conv.meta.get("nn_module_stack"),
        "fused": parts,
        "weights": weights,
        "summand": source_name(conv),  # its value before anything is added
    }
    if "activation" in act:
        fused.meta["before_activation"] = source_name(before)
    copy_meta(fused, last)
    last.replace_all_uses_with(fused)
    for node in reversed(chain):
        graph.erase_node(node)


def _activation(graph_module: fx.GraphModule, node: fx.Node, value: fx.Node) -> dict[str, Any]:
    """The operator's arguments for an activation of `value`, empty where `node` is none that it has."""
    if is_call(node, aten.relu.default):
        return {"relu": True}
    a = named_args(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if is_relu6(node):
        return {"activation": "relu6"}
    if is_call(node, aten.leaky_relu.default):
        return {"activation": "leaky_relu", "negative_slope": float(a["negative_slope"])}
    if is_call(node, aten.gelu.default):
        return {"activation": "gelu_tanh" if a["approximate"] == "tanh" else "gelu"}
    if is_call(node, aten.prelu.default):
        slope = constant(graph_module, a["weight"])
        return {} if slope is None or args_of(node)[0] is not value else {"activation": "prelu", "slope": a["weight"]}
    return {"activation": schema_name(node)} if is_call(node, *_WITHOUT_ARGUMENTS) else {}


def _gate(product: fx.Node) -> str:
    """What a product multiplies with where that is computed, and broadcast to the other factor; else empty."""
    values = [n.meta.get("val") for n in product.args if isinstance(n, fx.Node) and n.op != "get_attr"]
    shapes = [[*map(str, value.shape[1:])] for value in values if isinstance(value, Tensor) and value.dim() == 4]
    if len(shapes) != 2:
        return ""
    if any(shape[1:] == ["1", "1"] != other[1:] for shape, other in (shapes, shapes[::-1])):
        return "a gate: one factor per channel, computed from the input"
    if any(shape[0] == "1" != other[0] for shape, other in (shapes, shapes[::-1])):
        return "a gate: one factor per pixel, computed from the input"
    return ""


def _arguments(graph_module: fx.GraphModule, conv: fx.Node) -> tuple[Conv2dBiasAct[Any] | None, str]:
    """The operator's arguments without an epilogue, bias None where there is none; or None and why it cannot be one."""
    defaults = (None, None, None, (1, 1), (0, 0), (1, 1), 1)
    args = (*args_of(conv), *defaults[len(conv.args) :])
    x, weight, bias, stride, padding, dilation, groups = args
    if conv.kwargs:
        return None, f"unexpected keyword arguments {sorted(conv.kwargs)}"
    if constant(graph_module, weight) is None:
        return None, "the weight is computed in the forward pass"
    if bias is not None and constant(graph_module, bias) is None:
        return None, "the bias is computed in the forward pass"
    if x.meta["val"].dim() != 4:
        return None, "the input has no batch dimension"
    dilation = pair(dilation)
    if padding == "valid":
        padding = [0, 0]
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, parameter(graph_module, weight).shape[2:], strict=True)]
        if any(length % 2 for length in total):
            return None, "padding 'same' is asymmetric for this kernel"
        padding = [length // 2 for length in total]
    geometry = (pair(stride), pair(padding), dilation)
    return Conv2dBiasAct.of(x, weight, bias, None, *geometry, groups), ""


def _other_summand(addition: fx.Node, conv: fx.Node) -> fx.Node | None:
    """What `addition` adds to `conv`, which it reads once, where it is a plain sum of two values of one shape."""
    if not is_call(addition, aten.add.Tensor) or addition.kwargs or len(addition.args) != 2:
        return None
    left, right = args_of(addition)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    other = right if left is conv else left
    if is_call(other, *_CONVOLUTIONS) and len(other.users) == 1:
        mine, its = (only_reader(args_of(summand)[0]) is not None for summand in (conv, other))
        if not (mine if mine != its else left is conv):
            return None
    return other if same_shape(conv, other) else None
