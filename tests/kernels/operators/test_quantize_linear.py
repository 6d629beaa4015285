"""Quantisation and dequantisation, held to what ONNX says they are; test_quantize_linear_properties.py has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from kernels.operators.quantize_linear import dequantize_linear, quantize_linear

WHOLE = {"int8": torch.int8, "uint8": torch.uint8}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16}


def reference(kind: str, *inputs: Tensor, **attributes: Any) -> Tensor:
    """One operator of opset 19, evaluated by ONNX itself."""
    arrays = {f"input_{i}": value.numpy() for i, value in enumerate(inputs)}
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in arrays.items()
    ]
    result = inputs[-1 if kind == "QuantizeLinear" else 1].numpy().dtype
    y = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(result), inputs[0].shape)
    graph = helper.make_graph([helper.make_node(kind, [*arrays], ["y"], **attributes)], "one", values, [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    (found,) = ReferenceEvaluator(model).run(None, arrays)
    return torch.from_numpy(np.asarray(found))


def activations(dtype: torch.dtype) -> Tensor:
    """Values of all sizes: far beyond both ends, at ties, near zero and between."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(90) * 20, torch.arange(-300, 300) / 2, torch.tensor([-1e4, 1e4, 0.0, -0.0, 1e-6, 3e4])])
    return x.to(dtype).reshape(4, 6, 1, 29)


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("scale", "zero_point"), [(1.0, 0), (0.5, 5), (0.1, 100), (7.3e-3, 5)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_is_onnx(dtype: str, scale: float, zero_point: int, whole: str) -> None:
    """In float16, x / scale is taken in float32, as accelerators do: ONNX gives it the same values, held wider."""
    x, s = activations(FLOATS[dtype]), torch.tensor(scale, dtype=FLOATS[dtype])
    z = torch.tensor(zero_point, dtype=WHOLE[whole])
    got, expected = quantize_linear(x, s, z), reference("QuantizeLinear", x.float(), s.float(), z)
    assert got.dtype == expected.dtype == WHOLE[whole] and torch.equal(got, expected)
    assert len(expected.unique()) > 5
    if scale in (1.0, 0.5):  # the quotient is exact
        assert torch.equal(got, reference("QuantizeLinear", x, s, z))


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_is_onnx(dtype: str, whole: str) -> None:
    """With one scale, with a scale for each output channel of a convolution, and of 32 bits without a zero point."""
    limits, channels = torch.iinfo(WHOLE[whole]), torch.logspace(-3, 1, 8).to(FLOATS[dtype])
    q = torch.arange(limits.min, limits.max + 1).to(WHOLE[whole]).reshape(8, 2, 4, 4)
    s, z = torch.tensor(0.0371, dtype=FLOATS[dtype]), torch.tensor(7, dtype=WHOLE[whole])
    got = dequantize_linear(q, s, z)
    assert got.dtype == FLOATS[dtype] and torch.equal(got, reference("DequantizeLinear", q, s, z))
    for zeros in (torch.zeros(8), torch.arange(8)):
        given = (q, channels, zeros.to(WHOLE[whole]))
        assert torch.equal(dequantize_linear(*given), reference("DequantizeLinear", *given, axis=0))
    wide, s = torch.tensor([-(2**30), -7, 0, 3, 2**30], dtype=torch.int32), torch.tensor([1e-6, 0.5, 2.0, 3.0, 1e-9])
    assert torch.equal(dequantize_linear(wide, s, None), reference("DequantizeLinear", wide, s, axis=0))


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype: str, whole: str) -> None:
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).to(FLOATS[dtype])
    s, z = torch.tensor(0.1, dtype=x.dtype), torch.tensor(3, dtype=WHOLE[whole])
    q = quantize_linear(x, s, z)
    channels = (q, torch.full((len(q),), 0.1, dtype=x.dtype), torch.zeros(len(q), dtype=q.dtype))
    torch.library.opcheck(quantize_linear, (x, s, z))
    for arguments in ((q, s, z), channels, (q.to(torch.int32), s, None)):
        torch.library.opcheck(dequantize_linear, arguments)
