"""Let the convolutions and linear layers of a graph compute with 8-bit weights and activations."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from export.base.errors import ExportError
from export.fusion.nodes import (
    QUANTISATION,
    add_constant,
    args_of,
    aten,
    constant,
    copy_meta,
    duplicate,
    input_nodes,
    is_call,
    module_path,
    moves_data,
    named_args,
    parameter,
    resnet_deploy,
    schema_name,
    source_name,
)
from export.fusion.passes.name_activations import ACTIVATIONS
from export.fusion.program import FusedProgram, QuantisedProgram
from export.quantisation.scheme import CPU, TENSORRT, Range, Scheme
from export.quantisation.split_addition import split_addition

LAYERS = (resnet_deploy.conv2d_bias_act.default, aten.linear.default)
_POOLS = (aten.max_pool2d.default, aten.mean.dim)
_CHOOSE = ("flip", "index_select", "pixel_shuffle", "pixel_unshuffle", "roll", "select", "upsample_nearest2d")
_SHAPES = ("sym_size", "_assert_tensor_metadata")
BIAS_LIMIT = 2.0**30  # an int32 bias leaves room for the sum of the products


def quantised_programs(
    program: FusedProgram, ranges: Mapping[str, Range], kept: Collection[str]
) -> dict[Scheme, QuantisedProgram]:
    """The program, fused at level b, as each scheme quantises it; `ranges` and `kept` as in `quantise`.

    Raises:
        ExportError: a range that a scheme cannot hold.
    """
    masters = {TENSORRT: program.master, CPU: split_addition(program.master)}
    return {
        scheme: QuantisedProgram(program, quantise(master, ranges, scheme, kept)) for scheme, master in masters.items()
    }


def quantise(
    graph_module: fx.GraphModule, ranges: Mapping[str, Range], scheme: Scheme, kept: Collection[str] = ()
) -> fx.GraphModule:
    """Put quantisation and dequantisation round what every layer computes from.

    A layer is a convolution or a linear layer with constant weights; first and last ones are no exception. Its input
    is quantised and, by the residual rule, the shortcut that is added to its result, but not the result: that goes
    to the addition and the ReLU as it is, and is quantised where the next layer reads it. With a scheme of quantised
    sums the result is quantised before the addition too. What is quantised for one reader all read in 8 bits, a pool
    or a concatenation too, but for layers that are kept and what the network returns. Values that are chosen from a
    quantised one, by a max-pool, a slice or a flip, have its scale.

    Args:
        graph_module: fused at level b; with `split_addition` for a scheme of quantised sums. float64.
        ranges: `source_name` of a value -> its smallest and largest value; of all in `quantised_values`.
        scheme: of the runtime.
        kept: `module_path` of the layers that stay in floating point.

    Raises:
        ExportError: a value without a range, or one whose scale the scheme cannot hold.
    """
    graph_module = duplicate(graph_module)
    layers = [node for node in quantisable(graph_module) if module_path(node) not in kept]
    values = _values(graph_module, layers, scheme)
    scales = {}
    for value in values:
        scales[value] = _quantise_value(graph_module, value, range_of(value, ranges), scheme, layers)
    for layer in layers:
        _quantise_weights(graph_module, layer, scheme, scales)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def quantisable(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The layers that can be quantised: every convolution and linear layer with a constant weight and bias."""
    found = []
    for node in graph_module.graph.nodes:
        if is_call(node, resnet_deploy.conv2d_bias_act.default):
            found.append(node)
        elif is_call(node, aten.linear.default):
            x, weight, bias = (*args_of(node), None)[:3]
            known = constant(graph_module, weight) is not None
            known = known and (bias is None or constant(graph_module, bias) is not None)
            if known and x.meta["val"].dim() == 2:
                found.append(node)
    return found


def quantised_values(graph_module: fx.GraphModule, scheme: Scheme) -> list[fx.Node]:
    """The values that `quantise` needs the range of, whichever layers are kept."""
    values = _values(graph_module, quantisable(graph_module), scheme)
    return list(dict.fromkeys(_ranged(value) for value in values))


def _values(graph_module: fx.GraphModule, layers: Collection[fx.Node], scheme: Scheme) -> list[fx.Node]:
    """What is to be quantised, in the order of the graph."""
    wanted: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node in layers:
            wanted.add(args_of(node)[0])
            if is_call(node, resnet_deploy.conv2d_bias_act.default) and args_of(node)[3] is not None:
                wanted.add(args_of(node)[3])
        elif scheme.quantised_sums and _sums(node, layers):
            wanted |= {args_of(node)[0], args_of(node)[1]}
        elif is_call(node, *_POOLS) and _layer_of(args_of(node)[0]) in layers:
            wanted.add(args_of(node)[0])
    return [node for node in graph_module.graph.nodes if node in wanted]


def _sums(node: fx.Node, layers: Collection[fx.Node]) -> bool:
    """Whether `node` is the residual addition of a layer: what `split_addition` made of it."""
    return is_call(node, aten.add.Tensor) and "fused" in node.meta and args_of(node)[0] in layers


def _layer_of(node: fx.Node) -> fx.Node:
    """The layer whose result, added to and activated, `node` is; `node` itself where it is something else."""
    while is_call(node, *ACTIVATIONS) or (is_call(node, aten.add.Tensor) and "fused" in node.meta):
        node = args_of(node)[0]
    return node


def is_input(value: fx.Node) -> bool:
    """Whether a value is an input of the network, in whatever layout."""
    return _before_moving(value).op == "placeholder"


def _before_moving(value: fx.Node) -> fx.Node:
    while value.op == "call_function" and moves_data(value):
        value = args_of(value)[0]
    return value


def _ranged(value: fx.Node) -> fx.Node:
    """Whose range a value has: pooled maxima are among what they are chosen from, and so is what a slice leaves.

    A slice of what is not quantised has its own range, which may be smaller.
    """
    end = value
    while is_call(end, aten.max_pool2d.default) or _chooses(end):
        end = args_of(end)[0]
    if is_call(end, *QUANTISATION):
        return _ranged(args_of(args_of(end)[0])[0])
    while is_call(value, aten.max_pool2d.default):
        value = args_of(value)[0]
    return value


def _chooses(value: fx.Node) -> bool:
    """Whether a call computes nothing but moves, repeats or leaves out what its first argument holds, or adds zeros."""
    if value.op != "call_function" or not value.args or not isinstance(args_of(value)[0], fx.Node):
        return False
    if is_call(value, aten.pad.default):
        given = named_args(value)
        return given["mode"] != "constant" or not given["value"]
    return schema_name(value) in _CHOOSE or (bool(schema_name(value)) and moves_data(value))


def _reads_floats(reader: fx.Node, layers: Collection[fx.Node]) -> bool:
    """Whether a reader of a quantised value takes it as it was: a kept layer, the output, or for its shape alone."""
    kept = reader
    if is_call(reader, aten.add.Tensor) and "fused" in reader.meta:
        kept = args_of(reader)[0]
    return reader.op == "output" or schema_name(reader) in _SHAPES or (is_call(kept, *LAYERS) and kept not in layers)


def summand_name(layer: fx.Node) -> str:
    """The name of a layer's own value, before anything is added: the same before and after `split_addition`."""
    return str(layer.meta.get("summand", source_name(layer)))


def range_of(value: fx.Node, ranges: Mapping[str, Range]) -> Range:
    """The calibrated range of a value that is quantised; raises ExportError where there is none."""
    name = source_name(_ranged(value))
    if name is None or name not in ranges:
        raise ExportError(f"{module_path(value)}: expected a calibrated range, got none")
    return ranges[name]


def _quantise_value(
    graph_module: fx.GraphModule, value: fx.Node, values: Range, scheme: Scheme, layers: Collection[fx.Node]
) -> Tensor:
    """Put a pair behind `value` for the readers that compute in 8 bits; returns its scale."""
    graph = graph_module.graph
    inputs = {node: name for name, node in input_nodes(graph_module).items()}
    label = inputs.get(_before_moving(value)) or module_path(value)
    if any(_sums(reader, layers) and args_of(reader)[0] is value for reader in value.users):
        label += ".summand"  # beside the sum, which has the same name
    scale, zero_point = scheme.activation(values)
    if not bool(torch.isfinite(scale)):
        raise ExportError(
            f"{label} reaches {max(map(abs, values)):.4g}: no scale in {scheme.arithmetic.dtype} holds that"
        )
    readers = [node for node in value.users if not _reads_floats(node, layers)]
    with graph.inserting_before(value.next):
        constants = _constants(graph_module, label, scale, zero_point)
        quantised = graph.call_function(resnet_deploy.quantize_linear.default, (value, *constants))
        dequantised = graph.call_function(resnet_deploy.dequantize_linear.default, (quantised, *constants))
    for node, role in ((quantised, "quantized"), (dequantised, "dequantized")):
        copy_meta(node, value)
        node.meta["label"] = f"{label}.{role}"
    for reader in readers:
        reader.replace_input_with(value, dequantised)
    return scale


def _quantise_weights(
    graph_module: fx.GraphModule, layer: fx.Node, scheme: Scheme, scales: Mapping[fx.Node, Tensor]
) -> None:
    name = module_path(layer)
    dequantised, weight, bias = (*args_of(layer), None)[:3]
    scale_x = scales[args_of(args_of(dequantised)[0])[0]]
    master = parameter(graph_module, weight)
    floor = None
    if scheme.quantised_sums and bias is not None:
        floor = parameter(graph_module, bias).abs() / (scale_x * BIAS_LIMIT)
    quantised, scale_w = scheme.weight(master, floor)
    zero_point = torch.zeros(len(quantised), dtype=torch.int8)
    arguments = list(layer.args)
    arguments[1] = _dequantised(graph_module, layer, f"{name}.weight", quantised, scale_w, zero_point)
    if scheme.quantised_sums and bias is not None:
        scale = scale_x * scale_w
        whole = (parameter(graph_module, bias) / scale).round().to(torch.int32)
        arguments[2] = _dequantised(graph_module, layer, f"{name}.bias", whole, scale, None)
    layer.args = tuple(arguments)


def _dequantised(
    graph_module: fx.GraphModule, layer: fx.Node, label: str, values: Tensor, scale: Tensor, zero_point: Tensor | None
) -> fx.Node:
    """A parameter as whole numbers and what makes it real ones."""
    graph = graph_module.graph
    with graph.inserting_before(layer):
        whole = add_constant(graph_module, f"{label}.quantized", values)
        constants = _constants(graph_module, label, scale, zero_point)
        node = graph.call_function(resnet_deploy.dequantize_linear.default, (whole, *constants))
    node.meta = {"nn_module_stack": layer.meta.get("nn_module_stack"), "label": label, "source": None}
    return node


def _constants(
    graph_module: fx.GraphModule, label: str, scale: Tensor, zero_point: Tensor | None
) -> tuple[fx.Node, fx.Node | None]:
    scale_node = add_constant(graph_module, f"{label}.scale", scale)
    if zero_point is None:
        return scale_node, None
    return scale_node, add_constant(graph_module, f"{label}.zero_point", zero_point)
