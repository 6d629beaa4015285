"""Take the residual addition out of the convolutions again, for runtimes that quantise both of its summands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from export.fusion.nodes import aten, copy_meta, duplicate, fused_args, fused_call, is_call, named_args, resnet_deploy
from kernels.operators.conv2d_bias_act import Conv2dBiasAct


def split_addition(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace each `conv2d_bias_act` that adds by a convolution, an addition and, where it has one, an activation."""
    graph_module = duplicate(graph_module)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not is_call(node, resnet_deploy.conv2d_bias_act.default) or named_args(node)["residual"] is None:
            continue
        a = fused_args(Conv2dBiasAct, node)
        with graph.inserting_before(node):
            conv = fused_call(graph, replace(a, residual=None, relu=False, activation="", slope=None))
            last = graph.call_function(aten.add.Tensor, (conv, a.residual))
            chain = [conv, last]
            if a.relu or a.activation:
                last = graph.call_function(*_activation(a, last))
                chain.append(last)
        for part in chain:
            copy_meta(part, node)
        conv.meta["source"] = node.meta["summand"]
        conv.meta["weights"] = {
            argument: owner for argument, owner in node.meta["weights"].items() if argument != "slope"
        }
        conv.meta.pop("before_activation", None)
        if len(chain) > 2:
            chain[1].meta["source"] = None
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    graph_module.recompile()
    return graph_module


def _activation(a: Conv2dBiasAct[Any], value: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """PyTorch's operator, its arguments and its keyword arguments for the activation of `value`."""
    name = "relu" if a.relu else a.activation
    arguments: dict[str, tuple[Any, ...]] = {
        "relu6": (0.0, 6.0), "leaky_relu": (a.negative_slope,), "prelu": (a.slope,)
    }  # fmt: skip
    target = {"relu6": aten.hardtanh, "gelu_tanh": aten.gelu}.get(name) or getattr(aten, name)
    return target.default, (value, *arguments.get(name, ())), {"approximate": "tanh"} if name == "gelu_tanh" else {}
