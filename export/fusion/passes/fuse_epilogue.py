"""Fuse conv -> (add) -> (relu) into one `conv2d_bias_act`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

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
    only_reader,
    pair,
    parameter,
    same_shape,
    source_name,
)
from kernels.operators.conv2d_bias_act import Conv2dBiasAct

_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)


def fuse_epilogue(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace every 2-D convolution with constant parameters by the fused operator.

    A following addition joins it where the convolution has no other reader and the other summand has
    the same shape (no broadcasting, no alpha); a ReLU joins where the value before it has no other
    reader. Of two convolutions that are added, the one that has its input to itself, which a shortcut has not, takes
    the other as its residual; else the left summand does.
    """
    graph_module = duplicate(graph_module)
    for conv in list(graph_module.graph.nodes):
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
    activation = only_reader(chain[-1])
    relu = is_call(activation, aten.relu.default)
    if activation is not None and relu:
        chain.append(activation)
    graph, last = graph_module.graph, chain[-1]
    with graph.inserting_before(last):
        if arguments.bias is None:
            weight = parameter(graph_module, arguments.weight)
            zeros = add_constant(graph_module, f"{module_path(conv)}.bias", weight.new_zeros(weight.shape[0]))
            arguments = replace(arguments, bias=zeros)
        fused = fused_call(graph, replace(arguments, residual=residual, relu=relu))
    name = module_path(conv)
    parts = [*conv.meta.get("fused", [name]), *(module_path(node) for node in chain[1:])]
    weights = {"weight": name, "bias": name}
    fused.meta = {
        "nn_module_stack": conv.meta.get("nn_module_stack"),
        "fused": parts,
        "weights": weights,
        "summand": source_name(conv),  # its value before anything is added
    }
    copy_meta(fused, last)
    last.replace_all_uses_with(fused)
    for node in reversed(chain):
        graph.erase_node(node)


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
    return Conv2dBiasAct.of(x, weight, bias, None, *geometry, groups, False), ""


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
