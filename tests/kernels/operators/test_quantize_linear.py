"""Quantisation and dequantisation, held to what ONNX says they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from kernels.operators.quantize_linear import dequantize_linear, quantize_linear

WHOLE = {"int8": torch.int8, "uint8": torch.uint8}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16}


def reference(kind: str, inputs: list[NDArray], result: int, **attributes: Any) -> NDArray:
    """One operator of opset 19, evaluated by ONNX itself."""
    names = [f"input_{i}" for i in range(len(inputs))]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in zip(names, inputs, strict=True)
    ]
    node = helper.make_node(kind, names, ["y"], **attributes)
    graph = helper.make_graph([node], "one", values, [helper.make_tensor_value_info("y", result, inputs[0].shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    (y,) = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    return np.asarray(y)


def activations(dtype: torch.dtype) -> Tensor:
    """Values of all sizes: far beyond both ends, at ties, near zero and between."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(90) * 20, torch.arange(-300, 300) / 2, torch.tensor([-1e4, 1e4, 0.0, -0.0, 1e-6, 3e4])])
    return x.to(dtype).reshape(4, 6, 1, 29)


@pytest.mark.parametrize("zero_point", [0, 5, 100])
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.1, 7.3e-3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_is_onnx(dtype: str, scale: float, whole: str, zero_point: int) -> None:
    """In float16, x / scale is taken in float32, as accelerators do: ONNX gives it the same values, held wider."""
    x, s = activations(FLOATS[dtype]), torch.tensor(scale, dtype=FLOATS[dtype])
    z = torch.tensor(zero_point, dtype=WHOLE[whole])
    got = quantize_linear(x, s, z)
    expected = reference(
        "QuantizeLinear",
        [x.float().numpy(), s.float().numpy(), z.numpy()],
        TensorProto.INT8 if whole == "int8" else TensorProto.UINT8,
    )
    assert got.dtype == WHOLE[whole]
    np.testing.assert_array_equal(got.numpy(), expected)
    assert len(np.unique(expected)) > 5


@pytest.mark.parametrize("whole", WHOLE)
def test_float16_is_onnx_where_the_quotient_is_exact(whole: str) -> None:
    x, s, z = activations(torch.float16), torch.tensor(0.5, dtype=torch.float16), torch.tensor(3, dtype=WHOLE[whole])
    kind = TensorProto.INT8 if whole == "int8" else TensorProto.UINT8
    expected = reference("QuantizeLinear", [x.numpy(), s.numpy(), z.numpy()], kind)
    np.testing.assert_array_equal(quantize_linear(x, s, z).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_ties_go_to_the_even_number(dtype: torch.dtype) -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], dtype=dtype)
    zero, one = torch.tensor(0, dtype=torch.int8), torch.tensor(1, dtype=torch.int8)
    assert quantize_linear(x, torch.tensor(1.0, dtype=dtype), zero).tolist() == [-2, -2, 0, 0, 2, 2]
    # before the zero point is added, not after it
    assert quantize_linear(x, torch.tensor(1.0, dtype=dtype), one).tolist() == [-1, -1, 1, 1, 3, 3]


@pytest.mark.parametrize(("whole", "ends"), [("int8", (-128, 127)), ("uint8", (0, 255))])
def test_what_does_not_fit_becomes_the_nearest_end(whole: str, ends: tuple[int, int]) -> None:
    x = torch.tensor([-1e30, -1e4, 1e4, 1e30, -torch.inf, torch.inf])
    q = quantize_linear(x, torch.tensor(0.5), torch.tensor(0, dtype=WHOLE[whole]))
    low, high = ends
    assert q.tolist() == [low, low, high, high, low, high]


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_is_onnx(dtype: str, whole: str) -> None:
    limits = torch.iinfo(WHOLE[whole])
    q = torch.arange(limits.min, limits.max + 1).to(WHOLE[whole]).reshape(2, 8, 4, 4)
    s, z = torch.tensor(0.0371, dtype=FLOATS[dtype]), torch.tensor(7, dtype=WHOLE[whole])
    got = dequantize_linear(q, s, z)
    kind = TensorProto.FLOAT if dtype == "fp32" else TensorProto.FLOAT16
    assert got.dtype == FLOATS[dtype]
    np.testing.assert_array_equal(got.numpy(), reference("DequantizeLinear", [q.numpy(), s.numpy(), z.numpy()], kind))


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (8, 1, 1, 1), (8, 5)], ids=["conv", "1x1", "linear"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_have_a_scale_and_a_zero_point_for_each_output_channel(dtype: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    s = torch.logspace(-3, 1, 8).to(FLOATS[dtype])
    for z in (torch.zeros(8, dtype=torch.int8), torch.arange(8).to(torch.int8)):
        kind = TensorProto.FLOAT if dtype == "fp32" else TensorProto.FLOAT16
        expected = reference("DequantizeLinear", [q.numpy(), s.numpy(), z.numpy()], kind, axis=0)
        np.testing.assert_array_equal(dequantize_linear(q, s, z).numpy(), expected)


def test_wide_whole_numbers_need_no_zero_point() -> None:
    q = torch.tensor([-(2**30), -7, 0, 3, 2**30], dtype=torch.int32)
    s = torch.tensor([1e-6, 0.5, 2.0, 3.0, 1e-9])
    expected = reference("DequantizeLinear", [q.numpy(), s.numpy()], TensorProto.FLOAT, axis=0)
    np.testing.assert_array_equal(dequantize_linear(q, s, None).numpy(), expected)
    wide = torch.tensor(0.1, dtype=torch.float64)
    assert dequantize_linear(q + 1, wide, None).tolist() == [number * 0.1 for number in (q + 1).tolist()]


def test_float64_stays_float64() -> None:
    """A scale of 64 bits is not rounded on the way: the oracle of the checks computes with it."""
    x, s, z = torch.tensor([0.3, 1.0]).double(), torch.tensor(1 / 3).double(), torch.tensor(0, dtype=torch.int8)
    third = torch.tensor(1.0, dtype=torch.float64) / 3
    assert quantize_linear(x, third * (1 + 2**-40), z).tolist() == [1, 3]
    for number in (3, 7, -101):
        whole = torch.tensor([number], dtype=torch.int8)
        assert dequantize_linear(whole, third, z).item() == number * third.item()
    assert dequantize_linear(quantize_linear(x, s, z), s, z).dtype == torch.float64


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_layout_is_kept(dtype: str) -> None:
    x = torch.randn(2, 6, 5, 4).to(FLOATS[dtype]).contiguous(memory_format=torch.channels_last)
    s, z = torch.tensor(0.1, dtype=FLOATS[dtype]), torch.tensor(0, dtype=torch.int8)
    q = quantize_linear(x, s, z)
    y = dequantize_linear(q, s, z)
    assert q.stride() == y.stride() == x.stride()
    weight = dequantize_linear(q, s.expand(2).contiguous(), z.expand(2).contiguous())
    assert weight.stride() == x.stride()


def test_inputs_are_left_as_they_were() -> None:
    x, s, z = torch.randn(40), torch.tensor(0.1), torch.tensor(1, dtype=torch.int8)
    copy = x.clone()
    q = quantize_linear(x, s, z)
    assert torch.equal(x, copy)
    again = q.clone()
    dequantize_linear(q, s, z)
    assert torch.equal(q, again) and q.data_ptr() != x.data_ptr()


LAYOUTS = {
    "plain": lambda: torch.randn(3, 5),
    "channels_last": lambda: torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    "one-channel": lambda: torch.randn(3, 1, 4, 4).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes_types_and_strides_are_told_before_running(dtype: str, whole: str, layout: str) -> None:
    x = LAYOUTS[layout]().to(FLOATS[dtype])
    s, z = torch.tensor(0.1, dtype=x.dtype), torch.tensor(3, dtype=WHOLE[whole])
    q = quantize_linear(x, s, z)
    channels = (q, torch.full((len(q),), 0.1, dtype=x.dtype), torch.zeros(len(q), dtype=q.dtype))
    wide = (q.to(torch.int32), s, None)
    for operator, arguments in (
        (quantize_linear, (x, s, z)),
        (dequantize_linear, (q, s, z)),
        (dequantize_linear, channels),
        (dequantize_linear, wide),
    ):
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}
