"""Every operator by name, and what registers one: on a CPU it is its reference, on a GPU its Triton kernels.

An operator is its arguments, one frozen type that is written once. The schema torch knows it by, the public function,
the launcher, the lowering to ONNX and the passes all take that type.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Optional, ParamSpec, TypeVar, cast, get_origin

import torch
from torch import Tensor

from kernels.problems import KERNEL_DTYPES, Problem
from kernels.rounding import Bound, Rounding

# The reference in float64 is the oracle.
REFERENCE_DTYPES = (*KERNEL_DTYPES, torch.float64)

T = TypeVar("T")
_Self = TypeVar("_Self", bound="Arguments[Any]")
_Parameters = ParamSpec("_Parameters")
_TENSORS: dict[Any, str] = {T: "Tensor", Optional[T]: "Tensor?"}  # noqa: UP045  a value, which mypy takes in this form
_SCHEMA_TYPES: dict[Any, str] = {
    **_TENSORS,
    tuple[int, int]: "int[2]",
    int: "int",
    bool: "bool",
    str: "str",
    float: "float",
}


@dataclass(frozen=True, eq=False)
class Arguments(Generic[T]):
    """An operator's arguments, in the order of its schema; T is Tensor or what stands for one in a graph.

    A field is a T, a T or None, a pair of integers, a number, a word or a flag.
    """

    operator: ClassVar[str]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def schema(cls) -> str:
        """The parameters as torch.library writes them: `Tensor x, Tensor? residual, int[2] stride`."""
        return ", ".join(f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in fields(cls))

    @classmethod
    def of(cls: type[_Self], *values: Any) -> _Self:
        """The arguments of a call in the order of the schema, of which those with a default may be left out."""
        pairs = [tuple(value) if isinstance(value, list) else value for value in values]
        return cls(**dict(zip(cls.names()[: len(pairs)], pairs, strict=True)))

    @classmethod
    def computed(cls, *values: Any) -> Tensor:
        """What a CPU makes of a call, its arguments as of `of`; raises ValueError as `check` does."""
        call = cls.of(*values)
        call.check(REFERENCE_DTYPES)
        return call.reference()

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.names())

    def tensors(self) -> dict[str, T]:
        """Those that are given, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.type in _TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self: _Self, function: Callable[[Any], Any]) -> _Self:
        """The same with every tensor replaced by what `function` makes of it."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def operands(self) -> dict[str, T]:
        """`tensors` by the names that kernels give them."""
        return self.tensors()

    @abstractmethod
    def check(self, dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
        """The shape of the output.

        Raises:
            ValueError: naming the argument, what was received and what is expected.
        """

    @abstractmethod
    def problem(self) -> Problem:
        """What is asked for, without the values: only shapes and dtypes are read."""

    @abstractmethod
    def reference(self) -> Tensor:
        """The operator in plain torch: the CPU path, and in float64 the oracle."""

    @abstractmethod
    def before_activation(self) -> Tensor:
        """The reference's value before the ReLU or other activation, and before the pool behind that."""

    def activated(self, value: Tensor) -> Tensor:
        """The activation of a value of `before_activation`."""
        return value.relu() if self.problem().relu else value

    def pool(self, value: Tensor) -> Tensor:
        """What follows the ReLU, of a value before or after it."""
        return value

    @abstractmethod
    def bound(self, pre: Tensor, rounding: Rounding) -> Bound:
        """What rounding explains of the error; `pre` is the exact value of `before_activation`."""

    def shared(self, pull: Tensor, rounding: Rounding) -> Tensor | float:
        """The variance that what is rounded inside gives sum(pull * y): many values of y share each such rounding."""
        return 0.0


OPERATORS: dict[str, type[Arguments[Any]]] = {}


def register(arguments: Callable[_Parameters, Arguments[Tensor]]) -> Callable[_Parameters, Tensor]:
    """Register `resnet_deploy::<name>(<arguments>) -> Tensor`; the public function, which takes the same arguments.

    kernels/launch.py and with it Triton is imported when an operator first runs on a GPU and not before.

    Args:
        arguments: the type, of Tensor: `MeanLinear[Tensor]`.
    """
    cls = cast(type[Arguments[Tensor]], get_origin(arguments))
    name = cls.operator

    def on_gpu(*values: Any) -> Tensor:
        try:
            from kernels import launch
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "triton":
                raise
            raise ModuleNotFoundError(
                f"{name} on a GPU needs the package triton: pip install 'triton>=3.6'", name="triton"
            ) from error
        return launch.run(name, *values)

    def fake(x: Tensor, *values: Any) -> Tensor:
        shape = cls.of(x, *values).check(KERNEL_DTYPES if x.device.type == "cuda" else REFERENCE_DTYPES)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    custom = torch.library.custom_op(
        f"resnet_deploy::{name}",
        cls.computed,
        mutates_args=(),
        device_types="cpu",
        schema=f"({cls.schema()}) -> Tensor",
        # A compiler must hand over the layouts it traced: the operators refuse any but channels_last.
        tags=(torch.Tag.needs_exact_strides,),
    )
    custom.register_kernel("cuda")(on_gpu)
    custom.register_fake(fake)
    OPERATORS[name] = cls

    names = cls.names()

    def function(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Tensor:
        call = cls(*args, **kwargs)  # not `arguments`, which torch.compile cannot trace
        y: Tensor = getattr(torch.ops.resnet_deploy, name)(*[getattr(call, argument) for argument in names])
        return y

    function.__name__ = function.__qualname__ = name
    function.__doc__ = cls.__doc__
    function.__signature__ = inspect.signature(cls)  # type: ignore[attr-defined]
    return function


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What a reference computes in: float32 for the 16-bit types."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
