"""The proof of precision: networks that are what they say, and networks with one layer that is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export import ExportError
from export.base.precision import INT8, PRECISIONS, Precision
from export.runtime.engines.engine import FLAVOURS, import_flavour
from export.runtime.engines.precision_proof import Proof, prove_precision
from tests.export.lowering import qdq

FP16 = PRECISIONS["fp16"]


@pytest.fixture(scope="module")
def trt() -> Any:
    return import_flavour(FLAVOURS["tensorrt-rtx"])


def prove(trt: Any, content: bytes, precision: Precision, kept: frozenset[str] = frozenset()) -> Proof:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(content)
    return prove_precision(trt, network, precision, kept)


def test_a_quantised_network_computes_in_int8(trt: Any) -> None:
    proof = prove(trt, qdq.network(), INT8)
    assert proof.types == dict.fromkeys(qdq.LAYERS, "INT8") and proof.convolutions == 2
    layers = {layer["name"]: layer for layer in proof.layers}
    assert layers["stage1.conv1"] == {
        "name": "stage1.conv1", "type": "CONVOLUTION", "inputs": ["HALF", "HALF"], "outputs": ["HALF"]
    }  # fmt: skip
    assert layers["stage1.conv1.input.q"]["outputs"] == ["INT8"] and layers["fc"]["type"] == "MATRIX_MULTIPLY"


@pytest.mark.parametrize("layer", qdq.LAYERS)
def test_a_layer_may_be_kept_in_fp16_if_that_was_asked(layer: str, trt: Any) -> None:
    content = qdq.network(kept=layer)
    proof = prove(trt, content, INT8, frozenset({layer}))
    assert proof.types == {**dict.fromkeys(qdq.LAYERS, "INT8"), layer: "HALF"}
    with pytest.raises(ExportError, match=f"^{layer} would not compute in INT8: .* for its input, got no Q/DQ$"):
        prove(trt, content, INT8)


@pytest.mark.parametrize("layer", qdq.LAYERS)
@pytest.mark.parametrize("part", ["input", "weights"])
def test_a_quantised_network_with_one_float_layer_is_refused(part: str, layer: str, trt: Any) -> None:
    doctored: dict[str, Any] = {f"float_{part}": layer}
    content = qdq.network(**doctored)
    for kept in (frozenset(), frozenset({"fc", "stage1.conv1", "stage1.conv2"} - {layer})):
        with pytest.raises(ExportError, match="would"):
            prove(trt, content, INT8, kept)
    with pytest.raises(ExportError, match=f"^{layer} would not compute in INT8: .*its {part}, got no Q/DQ"):
        prove(trt, content, INT8)


def test_other_8_bits_are_refused(trt: Any) -> None:
    with pytest.raises(ExportError, match=r"conv2 would not compute in INT8: .* got FP8 dequantised to HALF"):
        prove(trt, qdq.network(fp8_input="stage1.conv2"), INT8)


def test_wider_arithmetic_under_q_and_dq_is_refused(trt: Any) -> None:
    with pytest.raises(ExportError, match=r"conv1 would not compute in INT8: .* got INT8 dequantised to FLOAT"):
        prove(trt, qdq.network(dtype=np.float32), INT8)
    content = qdq.network(wide="stage1.conv2")
    with pytest.raises(ExportError, match="conv2 would not compute in INT8"):
        prove(trt, content, INT8)
    with pytest.raises(ExportError, match="conv2 would compute in FLOAT: expected HALF"):
        prove(trt, content, INT8, frozenset({"stage1.conv2"}))


def test_a_quantised_layer_is_no_float_layer(trt: Any) -> None:
    content = qdq.network()
    for kept in ("fc", "stage1.conv1"):
        with pytest.raises(ExportError, match=f"{kept} would compute in INT8, its weights are quantised: expected H"):
            prove(trt, content, INT8, frozenset({kept}))
    with pytest.raises(ExportError, match="conv9 is to be kept in a wider type, but the network has no such layer"):
        prove(trt, content, INT8, frozenset({"conv9"}))
    for precision, dtype in (("fp16", np.float16), ("fp32", np.float32)):
        with pytest.raises(ExportError, match="conv1 would compute in INT8, its weights are quantised"):
            prove(trt, qdq.network(dtype=dtype), PRECISIONS[precision])


def test_one_layer_of_another_type_is_enough(trt: Any) -> None:
    content = qdq.network(kept="stage1.conv1", wide="stage1.conv2", float_weights="fc", float_input="fc")
    with pytest.raises(ExportError, match=r"^stage1\.conv2 would compute in FLOAT: expected HALF$"):
        prove(trt, content, FP16)


def test_a_network_that_is_not_strongly_typed_is_refused(trt: Any) -> None:
    network = SimpleNamespace(get_flag=lambda flag: False, num_layers=0)
    with pytest.raises(ExportError, match="strongly typed"):
        prove_precision(trt, network, FP16)
