"""What holds for every tensor that is quantised or dequantised: examples are drawn, float64 judges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.operators.quantize_linear import dequantize_linear, quantize_linear
from tests.kernels.strategies import any_layouts, examples

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by name."""

    operator: Any
    arguments: dict[str, Tensor | None]

    def given(self, name: str) -> Tensor:
        """An argument that there is."""
        value = self.arguments[name]
        assert value is not None
        return value

    def run(self) -> Tensor:
        y: Tensor = self.operator(*self.arguments.values())
        return y

    def fake(self) -> Tensor:
        with FakeTensorMode() as mode:
            y: Tensor = self.operator(*[None if a is None else mode.from_tensor(a) for a in self.arguments.values()])
        return y

    def doubles(self) -> list[Tensor]:
        """The arguments in float64, for the oracle; no zero point is 0."""
        zero = torch.zeros(())
        return [(zero if a is None else a.detach()).double() for a in self.arguments.values()]


@st.composite
def scales(draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...] = ()) -> Tensor:
    """Powers of two, or anything between them; products with 8 bits are normal numbers in every dtype."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    exponents = torch.randint(-12, 4, shape, generator=generator)
    between = torch.rand(shape, generator=generator, dtype=torch.float64) if draw(st.booleans()) else 0.0
    return (2.0**exponents * (1 + between)).to(dtype)


@st.composite
def zero_points(draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...] = ()) -> Tensor:
    limits = torch.iinfo(dtype)
    values = st.sampled_from([0, limits.min, limits.max]) | st.integers(limits.min, limits.max)
    return torch.tensor([draw(values) for _ in range(math.prod(shape))], dtype=dtype).reshape(shape)


SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def quantise_calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Call:
    """Of values on either side of ties, at them, beyond the range and infinite, in any layout."""
    shape, dtype, whole = draw(SHAPES), draw(st.sampled_from(dtypes)), draw(st.sampled_from(WHOLE))
    scale = draw(scales(dtype))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kinds = torch.stack(
        [
            torch.randn(shape, generator=generator) * 100,
            torch.randint(-300, 300, shape, generator=generator) + 0.5,
            torch.full(shape, draw(st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1e30, -1e30]))),
        ]
    )
    chosen = kinds.gather(0, torch.randint(0, 3, (1, *shape), generator=generator))[0]
    x = draw(any_layouts(len(shape))).of((chosen.double() * scale.double()).to(dtype))
    return Call(quantize_linear, {"x": x, "scale": scale, "zero_point": draw(zero_points(whole))})


@st.composite
def dequantise_calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Call:
    """Of 8 bits with a zero point or of 32 without, with one scale or one for each element of the first axis."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
    whole = draw(st.sampled_from([*WHOLE, torch.int32]))
    channels = draw(st.sampled_from([(), shape[:1]]))
    limits = torch.iinfo(whole)
    most = 2**8 if whole == torch.int32 and dtype == torch.float16 else limits.max
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.randint(max(limits.min, -most), most, shape, generator=generator).to(whole)
    q = replace(draw(any_layouts(len(shape))), requires_grad=False).of(values)
    zero_point = None if whole == torch.int32 or draw(st.booleans()) else draw(zero_points(whole, channels))
    return Call(dequantize_linear, {"q": q, "scale": draw(scales(dtype, channels)), "zero_point": zero_point})


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """16-bit types are computed in float32."""
    return dtype if dtype == torch.float64 else torch.float32


def of_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def same(before: dict[str, Tensor | None], after: dict[str, Tensor | None]) -> bool:
    pairs = zip(before.values(), after.values(), strict=True)
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)


def copies(call: Call) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.detach().clone() for name, value in call.arguments.items()}


def assert_foretold(call: Call, y: Tensor) -> None:
    """The fake is shaped and laid out like the real output."""
    fake = call.fake()
    assert (fake.shape, fake.dtype, fake.storage_offset()) == (y.shape, y.dtype, y.storage_offset())
    # Along an axis of one element any stride will do.
    wide = [axis for axis, size in enumerate(y.shape) if size > 1]
    assert [fake.stride(axis) for axis in wide] == [y.stride(axis) for axis in wide]


@examples(300)
@given(quantise_calls())
def test_quantised_values_are_those_of_float64(call: Call) -> None:
    """But where the quotient, once rounded, may be on the other side of a tie; by a power of two it is exact."""
    before = copies(call)
    got = call.run()
    assert same(before, call.arguments)
    assert_foretold(call, got)
    x, scale, zero = call.doubles()
    whole = call.given("zero_point").dtype
    error = 0.0 if math.frexp(scale.item())[0] == 0.5 else 2 * roundoff(arithmetic(call.given("x").dtype))
    ends = torch.stack([x / scale * (1 - error), x / scale * (1 + error)]).round() + zero
    low, high = ends.clamp(torch.iinfo(whole).min, torch.iinfo(whole).max).aminmax(dim=0)
    assert got.dtype == whole and got.shape == x.shape
    assert bool(((got >= low) & (got <= high)).all())


@examples(300)
@given(dequantise_calls())
def test_dequantised_values_are_those_of_float64_rounded(call: Call) -> None:
    before = copies(call)
    got = call.run()
    assert same(before, call.arguments)
    assert_foretold(call, got)
    q, scale, zero = call.doubles()
    expected = (q - of_channels(zero, q)) * of_channels(scale, q)
    dtype = call.given("scale").dtype
    # Up to 2^24 whole numbers are exact in float32.
    rounded = 2 if call.given("q").dtype == torch.int32 else 1
    error = rounded * roundoff(arithmetic(dtype)) + (roundoff(dtype) if dtype != arithmetic(dtype) else 0.0)
    assert got.dtype == dtype and got.shape == q.shape
    assert bool(((got.double() - expected).abs() <= 1.001 * error * expected.abs()).all())


@examples(100)
@given(dequantise_calls(dtypes=(torch.float16, torch.float32, torch.float64)), st.data())
def test_dequantised_values_are_quantised_to_themselves(call: Call, data: st.DataObject) -> None:
    """bfloat16 has too few bits for it."""
    q = call.given("q").to(data.draw(st.sampled_from(WHOLE)))
    scale, zero = data.draw(scales(call.given("scale").dtype)), data.draw(zero_points(q.dtype))
    assert torch.equal(quantize_linear(dequantize_linear(q, scale, zero), scale, zero), q)


@examples(100)
@given(quantise_calls() | dequantise_calls(), st.data())
def test_permuted_rows_give_permuted_outputs(call: Call, data: st.DataObject) -> None:
    """Rows with scales of their own take them along."""
    order = torch.tensor(data.draw(st.permutations(range(len(call.given(next(iter(call.arguments))))))))
    permuted = {
        name: value[order] if value is not None and value.ndim else value for name, value in call.arguments.items()
    }
    assert torch.equal(replace(call, arguments=permuted).run(), call.run()[order])
