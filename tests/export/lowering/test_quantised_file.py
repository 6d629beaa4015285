"""The ONNX files of quantised networks: what reads 8 bits in them, and that ONNX Runtime computes so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export.quantisation.scheme import CPU, TENSORRT, Scheme
from export.runtime.onnx_session import optimised_operators
from tests.export import networks
from tests.export import quantised as q8
from tests.export.onnx_edits import producer

LAYERS: dict[Any, int] = {"basic": 13, "resnet8": 10} | networks.LAYERS
BASIC = {"Conv": 12, "Gemm": 1, "Add": 4, "Relu": 9, "MaxPool": 1, "ReduceMean": 1, "Reshape": 1}
# 10 layers' inputs and their 3 shortcuts, which projections share or make, and what both pools read; 13 weights
PAIRS = {TENSORRT: {"QuantizeLinear": 15, "DequantizeLinear": 15 + 13, "Cast": 2}}
PAIRS[CPU] = {"QuantizeLinear": 15 + 4, "DequantizeLinear": 15 + 4 + 13 + 13}  # and the 4 sums, and the biases


@pytest.fixture
def model(in_8_bits: Mapping[str, q8.Subject], scheme: Scheme) -> onnx.ModelProto:
    return in_8_bits["basic"].file(scheme).model


def layer_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]


def constants(model: onnx.ModelProto) -> dict[str, NDArray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def is_pair(model: onnx.ModelProto, value: str) -> bool:
    """Whether a value is quantised and dequantised, with the same scale and zero point."""
    last = producer(model, value)
    if last.op_type != "DequantizeLinear":
        return False
    first = producer(model, last.input[0])
    return first.op_type == "QuantizeLinear" and first.input[1:] == last.input[1:]


def assert_reads_8_bits(model: onnx.ModelProto, layers: int, *kept: str) -> None:
    """The file is valid, and so many layers but those that are kept read inputs and weights of 8 bits."""
    onnx.checker.check_model(model, full_check=True)
    nodes = [node for node in layer_nodes(model) if node.name not in kept]
    assert len(nodes) == layers
    for node in nodes:
        assert is_pair(model, node.input[0]), node.name
        weight = producer(model, node.input[1])
        assert weight.op_type == "DequantizeLinear", node.name
        assert constants(model)[weight.input[0]].dtype == np.int8


def test_operators_of_the_file(model: onnx.ModelProto, scheme: Scheme) -> None:
    """For TensorRT one side of a sum is quantised, the shortcut's; the other comes from the convolution as it is."""
    for node in (node for node in model.graph.node if node.op_type == "Add"):
        quantised = [is_pair(model, value) for value in node.input]
        assert sorted(quantised) == [scheme is CPU, True]
        assert scheme is CPU or producer(model, node.input[quantised.index(False)]).op_type == "Conv"
    assert Counter(node.op_type for node in model.graph.node) == BASIC | PAIRS[scheme]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]


def test_types_of_the_file(model: onnx.ModelProto, scheme: Scheme) -> None:
    values = constants(model)
    wide = np.dtype(np.float16 if scheme is TENSORRT else np.float32)
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        assert values[node.input[1]].dtype == wide
        if node.op_type == "QuantizeLinear":
            expected = np.int8 if scheme is TENSORRT else np.uint8
            assert values[node.input[2]].dtype == expected and values[node.input[2]].shape == ()
            assert scheme is CPU or values[node.input[2]] == 0
        elif node.input[0] in values:
            axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
            assert axis == 0 and values[node.input[1]].shape == values[node.input[0]].shape[:1]
            assert values[node.input[0]].dtype != np.int8 or not values[node.input[2]].any()  # symmetric
    kinds = {
        values[n.input[0]].dtype for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values
    }
    assert kinds == ({np.dtype(np.int8)} if scheme is TENSORRT else {np.dtype(np.int8), np.dtype(np.int32)})
    # nothing that is quantised is there as floats too, and nothing unused
    assert not [name for name, value in values.items() if value.ndim > 1 and value.dtype != np.int8]
    assert values.keys() <= {name for node in model.graph.node for name in node.input}
    biases = [name for name, value in values.items() if name.endswith(".bias") and value.dtype.kind == "f"]
    assert bool(biases) is (scheme is TENSORRT)


def test_the_file_for_cpus_runs_in_whole_numbers(in_8_bits: Mapping[str, q8.Subject]) -> None:
    run = optimised_operators(in_8_bits["basic"].file(CPU).model)
    assert run["QLinearConv"] == 12 and run["QLinearAdd"] == 4
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add"} & run.keys()


@pytest.mark.parametrize("network", LAYERS, ids=q8.name_of)
def test_the_file_computes_what_the_simulation_does(
    network: networks.Network | str, in_8_bits: Mapping[Any, q8.Subject], scheme: Scheme
) -> None:
    """Every value to the LSB that rounding explains, and the outputs as near to float64 as the simulations are."""
    subject = in_8_bits[network]
    layers = LAYERS[network] - (network is networks.doubled)  # of equal nodes the file has one
    assert_reads_8_bits(subject.file(scheme).model, layers)
    rung = subject.judge(scheme)
    assert rung and rung.operators is not None and not rung.operators.unchecked, rung.verdict


KEPT = [("conv1", "layer1.0.conv1", "layer2.0.downsample.0"), ("layer1.0.conv2", "fc")]


@pytest.mark.parametrize("kept", KEPT, ids=" ".join)
def test_kept_layers_are_floats_in_the_file(
    kept: tuple[str, ...], in_8_bits: Mapping[str, q8.Subject], scheme: Scheme
) -> None:
    subject = in_8_bits["resnet8"].keeping(*kept)
    model = subject.file(scheme).model
    assert_reads_8_bits(model, LAYERS["resnet8"] - len(kept), *kept)
    for node in layer_nodes(model):
        if node.name in kept:
            assert not is_pair(model, node.input[0])
            assert constants(model)[node.input[1]].dtype == (np.float16 if scheme is TENSORRT else np.float32)
    if scheme is CPU and kept == KEPT[-1]:
        run = optimised_operators(model)  # what a kept layer reads is left in floats too: here from two others
        assert run["Conv"] + run["FusedConv"] == 3 and run["QLinearConv"] == LAYERS["resnet8"] - 1 - 3
    sums = [[is_pair(model, value) for value in node.input] for node in model.graph.node if node.op_type == "Add"]
    assert ([False, False] in sums) is ("layer1.0.conv2" in kept)
    checks = subject.check(scheme, subject.simulated(subject.quantised[scheme]))
    assert checks and not checks.unchecked, checks.first_failure
    weights = {check.name for check in checks.checks if check.kind == "weight"}
    assert not weights & {f"{layer}.{role}" for layer in kept for role in ("weight", "bias")}
