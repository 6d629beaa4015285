"""y = act(op(a, b) + c), element by element: sums, products, gates, activations, copies into another layout or type."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.configs.config import Config, KernelLaunch, Operand, launch_options, pixel_reason, uses_pdl
from kernels.configs.heuristic import rule
from kernels.configs.targets import Target
from kernels.operators.activations import Activation
from kernels.problems import Problem, Shapes, dtype_word
from kernels.rounding import UNIT_ROUNDOFF, Rounding

OPERATIONS = ("copy", "add", "subtract", "multiply", "divide", "prelu", "normalise")
AXES = 4
_NAMES = ("a", "b", "c", "y")
_BLOCK = 1024  # elements of a program: 16 bytes of a 16-bit type per thread
_VECTOR = 8  # elements that are loaded at once, at most
_ABSENT = (0,) * AXES


@dataclass(frozen=True)
class Layout:
    """How a tensor lies along the axes of a problem: type, strides and first element, in elements."""

    dtype: torch.dtype
    strides: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class ElementwiseProblem:
    """y = act(op(a, b) + c); without b, b is `number`; without c, c is 0.

    Attributes:
        sizes: of four axes, the outermost first.
        a, y, b, c: how they lie; a stride is 0 along an axis over which an operand is the same.
        operation: one of OPERATIONS; prelu is a where a > 0, else a * b; normalise is (a / 255 - b) / c, of bytes and
            float32, and c is not added.
        activation: as the fused operators have it, or "relu".
        vector: elements of which every image has a whole number of: as many are loaded at once.
    """

    sizes: tuple[int, ...]
    a: Layout
    y: Layout
    b: Layout | None = None
    c: Layout | None = None
    operation: str = "copy"
    number: float = 0.0
    activation: str = ""
    negative_slope: float = 0.01
    vector: int = 1

    operator: ClassVar[str] = "elementwise"
    parts: ClassVar[tuple[Problem, ...]] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], **settings: Any) -> "ElementwiseProblem":
        """The problem of these tensors, among them a and y; the others are broadcast to the shape of y.

        Raises:
            ValueError: they lie along more axes than a kernel has.
        """
        y = tensors["y"]
        given = {name: tensors[name].expand(y.shape) for name in _NAMES if name in tensors}
        sizes, strides = _coalesced(y.shape, [tensor.stride() for tensor in given.values()])
        if len(sizes) > AXES:
            raise ValueError(f"tensors lie along {len(sizes)} axes, expected at most {AXES}")
        missing = AXES - len(sizes)
        sizes = [*sizes[:1], *[1] * missing, *sizes[1:]]
        layouts: dict[str, Any] = {
            name: Layout(t.dtype, (*s[:1], *[0] * missing, *s[1:]), int(t.storage_offset()))
            for (name, t), s in zip(given.items(), strides, strict=True)
        }
        vector = math.gcd(math.prod(y.shape[1:]), _VECTOR)
        return cls(tuple(sizes), **layouts, vector=vector, **settings)

    def expected(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(y, its sigma as rounding explains it, its value before the activation) in float64, along the axes.

        Args:
            tensors: a and what there is of b and c, each as the whole of its storage.
        """

        def view(name: str, layout: Layout) -> Tensor:
            return tensors[name].as_strided(self.sizes, layout.strides, layout.start).double()

        a = view("a", self.a)
        b = torch.tensor(self.number, dtype=torch.float64) if self.b is None else view("b", self.b)
        pre = {
            "copy": lambda: a,
            "add": lambda: a + b,
            "subtract": lambda: a - b,
            "multiply": lambda: a * b,
            "divide": lambda: a / b,
            "prelu": lambda: torch.where(a > 0, a, a * b),
            "normalise": lambda: a,
        }[self.operation]()
        rounding = Rounding(UNIT_ROUNDOFF[self.dtype], dtype=torch.float64)
        if self.operation == "normalise" and self.c is not None:
            scaled, centred, std = a / 255, a / 255 - b, view("c", self.c)
            pre = centred / std
            steps = (scaled.square() + centred.square()) / std.square() + pre.square()
            return pre, (UNIT_ROUNDOFF[torch.float32] ** 2 * steps + rounding.of(pre)).sqrt(), pre
        variance = (UNIT_ROUNDOFF[torch.float32] * pre).square() if self.operation != "copy" else torch.zeros_like(pre)
        if self.c is not None:
            pre = pre + view("c", self.c)
            variance = variance + (UNIT_ROUNDOFF[torch.float32] * pre).square()
        if self.activation in ("", "relu"):
            return (pre.relu() if self.relu else pre), (variance + rounding.of(pre)).sqrt(), pre
        act = Activation(self.activation, self.negative_slope, None)
        return act(pre), act.bound(variance, pre, rounding).sigma, pre

    @property
    def layouts(self) -> dict[str, Layout]:
        return {name: layout for name in _NAMES if (layout := getattr(self, name)) is not None}

    @property
    def total(self) -> int:
        return math.prod(self.sizes)

    @property
    def batch(self) -> int:
        return self.sizes[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.y.dtype

    @property
    def relu(self) -> bool:
        return self.activation == "relu"

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def flops(self) -> int:
        return self.total

    @property
    def activation_bytes(self) -> int:
        return sum(self._elements(layout) * layout.dtype.itemsize for layout in self.layouts.values())

    def _elements(self, layout: Layout) -> int:
        return math.prod(size for size, stride in zip(self.sizes, layout.strides, strict=True) if stride)

    @property
    def weight_bytes(self) -> int:
        return 0

    @property
    def loads_are_vectors(self) -> bool:
        """Never asked of a kernel that mixes layouts."""
        return False

    @property
    def key(self) -> str:
        words = [self.operation, "x".join(map(str, self.sizes)), self.activation]
        words += [f"{name} {dtype_word(v.dtype)} {v.strides} +{v.start}" for name, v in self.layouts.items()]
        return f"elementwise {' '.join(filter(None, words))} {self.number:g}"

    @property
    def shapes(self) -> Shapes:
        return {name: self.sizes for name in self.layouts if name != "y"}

    @property
    def settings(self) -> dict[str, Any]:
        return {"operation": self.operation, "number": self.number, "activation": self.activation}

    def with_batch(self, batch: int) -> "ElementwiseProblem":
        return replace(self, sizes=(batch, *self.sizes[1:]))

    def with_dtype(self, dtype: torch.dtype) -> "ElementwiseProblem":
        layouts: dict[str, Any] = {name: replace(layout, dtype=dtype) for name, layout in self.layouts.items()}
        return replace(self, **layouts)


def _coalesced(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Sizes of the fewest axes that describe all tensors, in the order in which the last lies, and their strides.

    The batch, which is the first axis, counts whatever its size: the same kernel then runs every batch.
    """
    axes = [axis for axis, size in enumerate(shape) if size != 1 or axis == 0] or [0]
    axes.sort(key=lambda axis: (axis != 0, -strides[-1][axis]))
    sizes = [shape[axis] if len(shape) else 1 for axis in axes]
    steps = [tuple(s[axis] if len(shape) else 0 for s in strides) for axis in axes]
    merged: list[int] = []
    kept: list[tuple[int, ...]] = []
    for size, step in zip(sizes, steps, strict=True):
        if kept and all(outer == inner * size for outer, inner in zip(kept[-1], step, strict=True)):
            merged[-1], kept[-1] = merged[-1] * size, step
        else:
            merged.append(size)
            kept.append(step)
    return merged, [tuple(step[index] for step in kept) for index in range(len(strides))]


@dataclass(frozen=True)
class ElementwiseConfig(Config, kind="elementwise", runs=ElementwiseProblem):
    """Elements and warps of a program."""

    block: int = _BLOCK
    num_warps: int = 4

    def unsupported_reason(self, problem: Problem, target: Target | None) -> str | None:
        assert isinstance(problem, ElementwiseProblem)
        return pixel_reason(problem.total, self.block)

    def problem_reason(self, problem: ElementwiseProblem, target: Target | None) -> str | None:
        return None

    def shared_memory(self, problem: ElementwiseProblem) -> int:
        return 0

    def accumulators(self, problem: ElementwiseProblem) -> int:
        return self.block // (32 * self.num_warps)

    def launches(self, problem: ElementwiseProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        layouts = problem.layouts
        scalars: dict[str, int] = {}
        for name in _NAMES:
            layout = layouts.get(name, Layout(torch.float32, _ABSENT, 0))
            strides = {f"{name.upper()}{axis}": stride for axis, stride in enumerate(layout.strides)}
            scalars |= {**strides, f"{name.upper()}_AT": layout.start}
        launch = KernelLaunch(
            kernel="elementwise._elementwise_kernel",
            problem=problem,
            config=self,
            operands={f"{n}_ptr": Operand(layouts[n].dtype) if n in layouts else None for n in _NAMES},
            scalars={
                "COUNT": problem.total // problem.vector,
                "MULTIPLE": problem.vector,
                **{f"D{axis}": problem.sizes[axis] for axis in range(1, AXES)},
                **scalars,
                "OP": problem.operation,
                "NUMBER": problem.number,
                "ACTIVATION": problem.activation,
                "NEGATIVE_SLOPE": problem.negative_slope,
                "BLOCK": self.block,
                "USE_PDL": uses_pdl(target),
            },
            grid=(-(-problem.total // self.block),),
            options=launch_options(self.num_warps, 2, target),
            tensors={"x": "a"},
        )
        return (launch,)


@rule(ElementwiseProblem)
def _elementwise_config(problem: ElementwiseProblem, target: Target) -> ElementwiseConfig:
    return ElementwiseConfig()
