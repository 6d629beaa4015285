"""What holds for every tensor that is quantised or dequantised: examples are drawn, float64 judges.

That files of these operators compute the same in ONNX Runtime is tested in tests/export/lowering.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.operators.quantize_linear import dequantize_linear, quantize_linear
from kernels.operators.registry import Arguments, T
from kernels.rounding import UNIT_ROUNDOFF
from tests.kernels.launching import assert_like, fake, operator, same
from tests.kernels.strategies import any_layouts, examples

ROUNDOFF = {**UNIT_ROUNDOFF, torch.float64: 2.0**-53}
FLOATS = tuple(ROUNDOFF)
WHOLE = (torch.int8, torch.uint8)


# No kernels run them, so there are arguments and no more.
@dataclass(frozen=True, eq=False)
class Quantize(Arguments[T]):
    operator = "quantize_linear"

    x: T
    scale: T
    zero_point: T


@dataclass(frozen=True, eq=False)
class Dequantize(Arguments[T]):
    operator = "dequantize_linear"

    q: T
    scale: T
    zero_point: T | None


Call = Quantize[Tensor] | Dequantize[Tensor]


def doubles(call: Call) -> list[Tensor]:
    """The arguments in float64, for the oracle; no zero point is 0."""
    return [torch.zeros(()).double() if a is None else a.detach().double() for a in call.values()]


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
def quantise_calls(draw: st.DrawFn) -> Quantize[Tensor]:
    """Of values on either side of ties, at them, beyond the range and infinite, in any layout."""
    shape, dtype, whole = draw(SHAPES), draw(st.sampled_from(FLOATS)), draw(st.sampled_from(WHOLE))
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
    return Quantize(x, scale, draw(zero_points(whole)))  # type: ignore[abstract]


@st.composite
def dequantise_calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Dequantize[Tensor]:
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
    return Dequantize(q, draw(scales(dtype, channels)), zero_point)  # type: ignore[abstract]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """16-bit types are computed in float32."""
    return dtype if dtype == torch.float64 else torch.float32


def of_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def checked(call: Call) -> Tensor:
    """What the operator gives; its inputs are as before, and its fake is shaped and laid out like it."""
    before = call.map(lambda tensor: tensor.detach().clone())
    y = operator(call)
    assert same(call, before)
    assert_like(fake(call), y)
    return y


@examples(300)
@given(quantise_calls())
def test_quantised_values_are_those_of_float64(call: Quantize[Tensor]) -> None:
    """But where the quotient, once rounded, may be on the other side of a tie; by a power of two it is exact."""
    got, whole = checked(call), call.zero_point.dtype
    x, scale, zero = doubles(call)
    error = 0.0 if math.frexp(scale.item())[0] == 0.5 else 2 * ROUNDOFF[arithmetic(call.x.dtype)]
    ends = torch.stack([x / scale * (1 - error), x / scale * (1 + error)]).round() + zero
    low, high = ends.clamp(torch.iinfo(whole).min, torch.iinfo(whole).max).aminmax(dim=0)
    assert got.dtype == whole and got.shape == x.shape
    assert bool(((got >= low) & (got <= high)).all())


@examples(300)
@given(dequantise_calls())
def test_dequantised_values_are_those_of_float64_rounded(call: Dequantize[Tensor]) -> None:
    got, dtype = checked(call), call.scale.dtype
    q, scale, zero = doubles(call)
    expected = (q - of_channels(zero, q)) * of_channels(scale, q)
    # Up to 2^24 whole numbers are exact in float32.
    rounded = 2 if call.q.dtype == torch.int32 else 1
    error = rounded * ROUNDOFF[arithmetic(dtype)] + (ROUNDOFF[dtype] if dtype != arithmetic(dtype) else 0.0)
    assert got.dtype == dtype and got.shape == q.shape
    assert bool(((got.double() - expected).abs() <= 1.001 * error * expected.abs()).all())


@examples(100)
@given(dequantise_calls(dtypes=(torch.float16, torch.float32, torch.float64)), st.data())
def test_dequantised_values_are_quantised_to_themselves(call: Dequantize[Tensor], data: st.DataObject) -> None:
    """bfloat16 has too few bits for it."""
    q = call.q.to(data.draw(st.sampled_from(WHOLE)))
    scale, zero = data.draw(scales(call.scale.dtype)), data.draw(zero_points(q.dtype))
    assert torch.equal(quantize_linear(dequantize_linear(q, scale, zero), scale, zero), q)


@examples(100)
@given(quantise_calls() | dequantise_calls(), st.data())
def test_permuted_rows_give_permuted_outputs(call: Call, data: st.DataObject) -> None:
    """Rows with scales of their own take them along."""
    order = torch.tensor(data.draw(st.permutations(range(len(call.values()[0])))))
    permuted = call.map(lambda tensor: tensor[order] if tensor.ndim else tensor)
    assert torch.equal(operator(permuted), operator(call)[order])


@pytest.mark.parametrize("whole", WHOLE, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype: torch.dtype, whole: torch.dtype) -> None:
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).to(dtype)
    s, z = torch.tensor(0.1, dtype=dtype), torch.tensor(3, dtype=whole)
    q = quantize_linear(x, s, z)
    channels = (q, torch.full((len(q),), 0.1, dtype=dtype), torch.zeros(len(q), dtype=whole))
    torch.library.opcheck(quantize_linear, (x, s, z))
    for arguments in ((q, s, z), channels, (q.to(torch.int32), s, None)):
        torch.library.opcheck(dequantize_linear, arguments)
