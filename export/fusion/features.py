"""The outputs of modules within a model in place of its own: what a detector's neck or a segmenter's head reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fractions import Fraction

from torch import Tensor, fx, nn

from export.base.errors import ExportError
from export.fusion.capture import copied
from export.fusion.nodes import moves_data, named_args, pair, schema_name, tensor_inputs
from export.fusion.program import output_names, output_nodes

_POOLS = ("max_pool2d", "avg_pool2d", "max_pool2d_with_indices")
_IN_PLACE = ("", "alias", "clone", "contiguous", "detach", "dropout")  # of what moves data, what moves no pixel
_Stride = tuple[Fraction, Fraction]


def with_features(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `model` that returns what these modules return, by their names and in their order, and nothing else.

    What only served the model's own output is then computed by nobody. The output itself is had as that of the module
    that makes it, such as `fc`.

    Args:
        model: any nn.Module; left as it was.
        names: of modules, as `named_modules` has them, each of which forward calls once and which returns a tensor.

    Raises:
        ExportError: a name that no module has; and from the copy's forward where one is not called once or returns
            no tensor.
    """
    duplicate, names = copied(model), tuple(names)
    modules = dict(duplicate.named_modules(remove_duplicate=False))
    del modules[""]
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3) or list(modules)[:3]
            raise ExportError(
                f"ExportConfig.features: no module is called {name!r}; expected one of the model's, such as "
                f"{', '.join(near)}"
            )
    found: dict[str, Tensor] = {}
    for name in names:
        modules[name].register_forward_hook(_Keep(name, found))
    duplicate.register_forward_pre_hook(_Forget(found))
    duplicate.register_forward_hook(_Return(names, found))
    return duplicate


class _Hook:
    """Hooks are objects, not closures: a copy of the model has copies of them, which share a dictionary of its own."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        self.found = found


class _Forget(_Hook):
    def __call__(self, module: nn.Module, inputs: object) -> None:
        self.found.clear()  # what a call that failed left


class _Keep(_Hook):
    def __init__(self, name: str, found: dict[str, Tensor]) -> None:
        super().__init__(found)
        self.name = name

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        where = f"ExportConfig.features: {self.name}"
        if not isinstance(output, Tensor):
            raise ExportError(f"{where} returns a {type(output).__name__}: expected a module that returns a tensor")
        if self.name in self.found:
            raise ExportError(f"{where} is called more than once in forward: expected a module that is called once")
        self.found[self.name] = output.clone()  # the next module may work in place


class _Return(_Hook):
    def __init__(self, names: tuple[str, ...], found: dict[str, Tensor]) -> None:
        super().__init__(found)
        self.names = names

    def __call__(self, module: nn.Module, inputs: object, outputs: object) -> dict[str, Tensor]:
        missing = [name for name in self.names if name not in self.found]
        if missing:
            raise ExportError(f"ExportConfig.features: forward does not call {', '.join(missing)}")
        returned = {name: self.found[name] for name in self.names}
        self.found.clear()
        return returned


def strides(source: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Name of an output -> how many pixels of the input lie between two of its cells, in height and width.

    Of maps [N, C, H, W] that convolutions, pools, enlargements and what works on each cell make of one input's pixels;
    other outputs are left out.
    """
    found: dict[fx.Node, _Stride] = {}
    for node in source.graph.nodes:
        stride = _stride(node, found)
        if stride is not None:
            found[node] = stride
    maps = dict(zip(output_names(source), output_nodes(source), strict=True))
    whole = {name: found[node] for name, node in maps.items() if node in found}
    return {name: (int(h), int(w)) for name, (h, w) in whole.items() if h.denominator == w.denominator == 1}


def _stride(node: fx.Node, found: dict[fx.Node, _Stride]) -> _Stride | None:
    size, kind = _map_size(node), schema_name(node)
    if node.op == "placeholder" and size is not None:
        return Fraction(1), Fraction(1)
    read = [n for n in tensor_inputs(node) if n in found]
    if node.op != "call_function" or not read:
        return None
    height, width = found[read[0]]
    if kind in _POOLS or kind in ("conv2d", "conv_transpose2d"):
        arguments = named_args(node)
        by_height, by_width = pair(arguments["stride"] or arguments["kernel_size"])
        if kind == "conv_transpose2d":
            return height / by_height, width / by_width
        return height * by_height, width * by_width
    sizes = [_map_size(n) for n in read]
    if kind.startswith("upsample") and size is not None and sizes[0] is not None:
        return height * Fraction(sizes[0][0], size[0]), width * Fraction(sizes[0][1], size[1])
    if moves_data(node) and kind not in _IN_PLACE:
        return None
    # a normalisation returns several values, of which one is the map
    same = {found[n] for n, other in zip(read, sizes, strict=True) if other in (None, size) or size is None}
    return same.pop() if len(same) == 1 else None


def _map_size(node: fx.Node) -> tuple[int, int] | None:
    """Height and width of [N, C, H, W]."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    return int(value.shape[2]), int(value.shape[3])
