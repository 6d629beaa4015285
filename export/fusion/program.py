"""The fused program: what every lowering starts from."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export.base.batch import DEFAULT_BATCH, INPUT, Batch
from export.base.errors import ExportError
from export.base.precision import PRECISIONS, Precision
from export.fusion.any_batch import NOTES
from export.fusion.capture import Example, capture, plain_torch
from export.fusion.casting import converted, types_of, with_constants_of
from export.fusion.nodes import (
    FUSED_OPERATORS,
    QUANTISATION,
    input_nodes,
    is_call,
    module_path,
    moves_data,
    schema_name,
    source_name,
    spoken_name,
)
from export.fusion.passes import DEFAULT_LEVEL, FOLDING, LEVELS
from export.fusion.passes.fold_batchnorm import constant_channels

_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)+", re.ASCII)  # the name of a module within another
_SINGLE = "single"  # what a program calls its graph in float32 among its modules


@dataclass(frozen=True)
class Operator:
    """One line of the coverage report.

    Attributes:
        name: the module of the user's model it comes from; for a fused operator, the one whose weights come
            last, such as `layer1.0.conv3`.
        kind: the operator that computes it.
        parts: for a fused operator, the modules it replaces, in order.
        reason: for an operator left eager, why no pass took it; empty where none was meant to.
    """

    name: str
    kind: str
    parts: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Which operators of a model were fused, and which run as they were.

    Attributes:
        notes: what is unusual about the model's parameters and outputs, a line each.
    """

    fused: tuple[Operator, ...]
    left: tuple[Operator, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused operators, {len(self.left)} left as they were"]
        lines += [f"  fused  {op.name}: {' + '.join(op.parts)}" for op in self.fused]
        lines += [f"  left   {op.name}: {op.kind}{f' ({op.reason})' if op.reason else ''}" for op in self.left]
        return "\n".join([*lines, *(f"  note   {note}" for note in self.notes)])


class FusedProgram(nn.Module):
    """A captured model, fused. Calling it computes what the model computes, in float32.

    Attributes:
        source: the captured graph before any pass, in float64 but for its constants, which are float32 as captured and
            take half the memory: what the operators are checked against.
        folded: the same with BatchNorm folded into the weights and no operator fused, float64.
        master: the fused graph with float64 parameters: each precision is cast from it, once.
        coverage: what was fused and what was left, by the names of the user's modules.
        batch: the batch sizes it accepts.
        inputs: name -> shape without the batch, in the order of forward: `input` of one with a single input.
        kept: names of the operators that compute in float32 whatever the precision.
    """

    source: fx.GraphModule
    folded: fx.GraphModule
    master: fx.GraphModule

    def __init__(self, source: fx.GraphModule, folded: fx.GraphModule, master: fx.GraphModule, batch: Batch) -> None:
        super().__init__()
        self.__dict__.update(source=source, folded=folded, master=master)  # kept out of parameters() and of .to()
        self.batch = batch
        self.inputs = {name: tuple(node.meta["val"].shape[1:]) for name, node in input_nodes(source).items()}
        self.kept: frozenset[str] = frozenset()
        self.coverage = _coverage(source, master)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The fused graph in float32; made when it is first asked for, which an export may never do."""
        if _SINGLE not in self._modules:
            self.add_module(_SINGLE, self.at(PRECISIONS["fp32"]))
        graph_module = self._modules[_SINGLE]
        assert isinstance(graph_module, fx.GraphModule)
        return graph_module

    def keeping(self, names: Collection[str]) -> FusedProgram:
        """The same program with the operators of these names in float32; names are those of `operator_nodes`."""
        kept = copy.copy(self)
        kept.kept = frozenset(names)
        return kept

    def at(self, precision: Precision) -> fx.GraphModule:
        """The fused graph in `precision`: its input, and all operators but those kept in float32, in its type.

        Raises:
            ExportError: a folded weight is outside the range of the type; names it.
        """
        return converted(self.master, precision.dtype, lambda node: module_path(node) in self.kept)

    def unfused_at(self, graph_module: fx.GraphModule, precision: Precision) -> fx.GraphModule:
        """`source` or `folded` in `precision`, with what the kept operators replaced in float32.

        A weight outside the range of the type is infinite, as it is in the user's model when that is cast. Where that
        is what it is already, it is the graph itself.
        """
        if not self.kept and types_of(graph_module) <= {precision.dtype}:
            return graph_module
        values = self._kept_values
        return converted(graph_module, precision.dtype, lambda node: source_name(node) in values, refuse=False)

    @property
    def _kept_values(self) -> set[str]:
        """The nodes of the captured graph that the kept operators compute, and what lies between in their fusion."""
        source = {node.name: node for node in self.source.graph.nodes}
        found: set[str] = set()
        for node in operator_nodes(self.master):
            name = source_name(node)
            if module_path(node) in self.kept and name is not None:
                read = {source_name(n) for n in node.all_input_nodes if n.op != "get_attr"}
                waiting = [source[name]]
                while waiting:
                    reached = waiting.pop()
                    if reached.name not in found | read:
                        found.add(reached.name)
                        waiting += reached.all_input_nodes
        return found

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of its one input; raises ExportError where it has several."""
        if len(self.inputs) > 1:
            raise ExportError(f"expected a model of one picture, got one that takes {', '.join(self.inputs)}")
        return self.inputs[INPUT]

    def forward(self, *inputs: Tensor, **by_name: Tensor) -> object:
        """Run the fused network on [N, C, H, W], or on several inputs as the model is called: in order or by name.

        Raises:
            ExportError: the inputs, the batch size or a shape are not what it was captured for.
        """
        ordered = call_inputs(self.inputs, self.batch, inputs, by_name)
        with plain_torch():
            return self.graph_module(*ordered)


class QuantisedProgram(FusedProgram):
    """A fused program whose layers compute in 8 bits.

    Attributes:
        before: the fused graph it was made from, float64.
    """

    before: fx.GraphModule

    def __init__(self, program: FusedProgram, master: fx.GraphModule) -> None:
        super().__init__(program.source, program.folded, master, program.batch)
        self.__dict__.update(before=program.master)


def call_inputs(
    expected: Mapping[str, tuple[int, ...]], batch: Batch, inputs: Sequence[Tensor], by_name: Mapping[str, Tensor]
) -> list[Tensor]:
    """What a program with these inputs and batch sizes is called with, in their order.

    Raises:
        ExportError: an input is missing, too many, of another shape or another batch size.
    """
    given = {**dict(zip(expected, inputs, strict=False)), **by_name}
    if given.keys() != expected.keys() or len(inputs) + len(by_name) != len(expected):
        got = [*(["one without a name"] * len(inputs)), *by_name]
        raise ExportError(f"expected {len(expected)} inputs, {', '.join(expected)}, got {', '.join(got) or 'none'}")
    first = given[next(iter(expected))]
    for name, shape in expected.items():
        x = given[name]
        if tuple(x.shape[1:]) != shape or not batch.minimum <= len(x) <= batch.maximum or len(x) != len(first):
            what = "an input" if len(expected) == 1 else name
            raise ExportError(f"expected {what} of shape [{batch}, *{list(shape)}], got {list(x.shape)}")
    return [given[name] for name in expected]


def fuse(model: nn.Module, example: Example, batch: Batch = DEFAULT_BATCH, level: str = DEFAULT_LEVEL) -> FusedProgram:
    """Capture `model`, fold its BatchNorm and fuse its operators.

    Args:
        model: any nn.Module in eval mode; left as it was.
        example: [N, C, H, W], floating point; of a model with several inputs the examples by the names of forward's
            parameters, {"left": [N, C, H, W], "state": [N, D]}; left as it was.
        batch: the batch sizes the program must accept.
        level: which fusions to apply, a key of `export.fusion.passes.LEVELS`. The default applies all; the others
            are there for the benchmark, to say what each fusion is worth.

    Raises:
        ExportError: an unknown level, or the model cannot be captured; says why in one line.
    """
    if level not in LEVELS:
        raise ExportError(f"expected a level of fusion of {', '.join(LEVELS)}, got {level!r}")
    captured = capture(model, example, batch)
    source = converted(captured, torch.float64)
    with plain_torch():
        folded = _applied(FOLDING, source)
        master = _applied(LEVELS[level], folded)
    return FusedProgram(with_constants_of(captured, source), folded, master, batch)


def _applied(
    passes: tuple[Callable[[fx.GraphModule], fx.GraphModule], ...], graph_module: fx.GraphModule
) -> fx.GraphModule:
    for apply in passes:
        graph_module = apply(graph_module)
    return graph_module


def operator_nodes(master: fx.GraphModule) -> list[fx.Node]:
    """What a fused graph computes: every call that does more than move data or quantise it, in order."""
    calls = [node for node in master.graph.nodes if node.op == "call_function" and not moves_data(node)]
    return [node for node in calls if not is_call(node, *QUANTISATION)]


def _coverage(source: fx.GraphModule, master: fx.GraphModule) -> Coverage:
    fused, left = [], []
    for node in operator_nodes(master):
        if is_call(node, *FUSED_OPERATORS):
            fused.append(Operator(module_path(node), schema_name(node), tuple(node.meta["fused"])))
        else:
            left.append(Operator(spoken_name(node), schema_name(node), reason=node.meta.get("refused", "")))
    notes = [*source.meta.get(NOTES, ()), *left_out(source), *constant_channels(source)]
    return Coverage(tuple(fused), tuple(left), tuple(notes))


def output_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Of what is exported: `output` for one tensor, dictionary keys for a dictionary, else output_0, output_1, …

    Raises:
        ExportError: the model returns no tensor that depends on its input.
    """
    names = tuple(name for name, node in _returned(graph_module).items() if _is_exported(node))
    if not names:
        raise ExportError("the model returns nothing: expected a tensor, or a tuple or dictionary of tensors")
    return names


def output_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """What is exported of what the graph returns, in the order of `output_names`."""
    return [node for node in _returned(graph_module).values() if _is_exported(node)]


def returned_tensors(graph_module: fx.GraphModule, outputs: object) -> list[Tensor]:
    """What is exported of `outputs`, which the graph returned, in the order of `output_names`."""
    leaves = zip(_returned(graph_module).values(), pytree.tree_leaves(outputs), strict=True)
    return [leaf for node, leaf in leaves if _is_exported(node)]


def left_out(graph_module: fx.GraphModule) -> list[str]:
    """One line for what the graph returns and no file can hold: None, numbers, strings, constants."""
    names = [name for name, node in _returned(graph_module).items() if not _is_exported(node)]
    return [f"not exported, as it is no tensor that depends on the input: {', '.join(names)}"] if names else []


def _returned(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Name -> node or constant, for each leaf of what the graph returns."""
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    spec: Any = graph_module._out_spec
    names = leaf_names(pytree.tree_unflatten(range(spec.num_leaves), spec), input_nodes(graph_module))
    return dict(zip(names, pytree.tree_leaves(output.args), strict=True))


def _is_exported(leaf: object) -> bool:
    """Whether it is a tensor, and not the same one whatever the input."""
    if not isinstance(leaf, fx.Node) or not isinstance(leaf.meta.get("val"), Tensor):
        return False
    seen, waiting = {leaf}, [leaf]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new
    return False


def leaf_names(outputs: object, inputs: Collection[str] = ()) -> list[str]:
    """A name for each leaf of what a model returns, none of them that of an input."""
    names: list[str] = []
    for path, _ in pytree.tree_flatten_with_path(outputs)[0]:
        words = "".join(c if c.isalnum() else " " for c in pytree.keystr(path)).split()
        word = "_".join(words)
        if not path:
            word = "output"
        elif len(path) == 1 and isinstance(path[0], pytree.MappingKey) and _MODULE.fullmatch(str(path[0].key)):
            word = str(path[0].key)  # as `features` are called
        elif not word.isidentifier() or word in (INPUT, *inputs):
            word = f"output_{word}"
        names.append(next(name for name in variants(word) if name not in names and name not in inputs))
    return names


def variants(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))
