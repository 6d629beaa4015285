"""The ONNX file: standard operators, the right precision, any batch size, nothing about this machine."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import Batch, fuse
from export.base.precision import PRECISIONS
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.runtime.onnx_session import rounded_copy
from export.runtime.parity.network import compare
from tests.export.networks import BATCH, Fused

ELEMENT = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
TRUNK = {"Conv": 20, "Relu": 16, "Add": 5, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1}

BIASES = {"fp16": {"Add": 6}}  # the head's is added apart


@pytest.fixture
def file(fused: Mapping[str, Fused], precision: str) -> OnnxFile:
    """Of a network of bottlenecks."""
    return fused["bottleneck"].files[precision]


def test_the_graph_holds_what_a_resnet_needs_and_no_more(file: OnnxFile, precision: str) -> None:
    assert {entry.key: entry.value for entry in file.model.metadata_props} == {"made": "by tests"}
    nodes = [node.op_type for node in file.model.graph.node]
    assert Counter(nodes) == TRUNK | ({} if precision == "fp32" else {"Cast": 2}) | BIASES.get(precision, {})
    (head,) = (node for node in file.model.graph.node if node.op_type == "Gemm")
    assert len(head.input) == (2 if precision == "fp16" else 3)
    assert precision == "fp32" or nodes[0] == nodes[-1] == "Cast"
    assert {node.domain for node in file.model.graph.node} == {""} and not file.model.functions
    (opset,) = file.model.opset_import
    assert (opset.domain, opset.version) == ("", 22 if precision == "bf16" else 18)


def test_precision_is_in_the_graph_and_float32_outside(
    file: OnnxFile, precision: str, fused: Mapping[str, Fused]
) -> None:
    """Weights have the users' names; the bias of a projection is part of that of the convolution it is added to."""
    graph = file.model.graph
    for value in [*graph.input, *graph.output]:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    modules = fused["bottleneck"].model.named_modules()
    layers = [name for name, module in modules if isinstance(module, nn.Conv2d | nn.Linear)]
    names = {f"{name}.weight" for name in layers} | {f"{name}.bias" for name in layers if "downsample" not in name}
    types = {t.name: t.data_type for t in graph.initializer if t.data_type != onnx.TensorProto.INT64}
    assert types == dict.fromkeys(names, ELEMENT[precision])


def test_the_file_is_valid_and_self_contained_and_says_nothing_of_this_machine(file: OnnxFile) -> None:
    onnx.checker.check_model(file.model, full_check=True)
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in file.model.graph.initializer)
    content = file.serialize()
    for secret in (str(Path.cwd()), str(Path.home()), "site-packages", ".py", "stack_trace"):
        assert secret.encode() not in content


MODULES = {"conv1": "relu", "maxpool": "maxpool", "avgpool": "avgpool", "layer1.1.conv3": "layer1.1"}
MODULES |= {"layer2.0.conv1": "layer2.0.bn1", "layer2.0.conv2": "layer2.0.bn2"}


def computed(model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, NDArray]:
    """What modules compute, followed by a ReLU: by the names that the file has for that."""
    model, found = copy.deepcopy(model).to(dtype), dict[str, NDArray]()

    def keep(name: str, module: nn.Module, inputs: Any, y: Tensor) -> None:
        found[name] = y.clone().relu().double().numpy()

    for name, module in MODULES.items():
        model.get_submodule(module).register_forward_hook(partial(keep, name))
    with torch.no_grad():
        model(images.to(dtype))
    return found


def rounded_values(file: OnnxFile, images: Tensor, *names: str) -> list[NDArray]:
    """What ONNX Runtime computes of the copy that rounds every value."""
    shown = rounded_copy(file.model)
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    values: list[NDArray] = session.run(list(names), {"input": images.numpy()})
    return values


def test_every_named_value_is_what_its_module_computes(
    file: OnnxFile, precision: str, fused: Mapping[str, Fused]
) -> None:
    """But for what rounding makes of the module itself."""
    p, network = PRECISIONS[precision], fused["bottleneck"]
    oracle, rounded = (computed(network.model, network.images, dtype) for dtype in (torch.float64, p.dtype))
    values = rounded_values(file, network.images, *MODULES)
    got = {name: value.reshape(oracle[name].shape) for name, value in zip(MODULES, values, strict=True)}
    for name, check in compare(got, [rounded], oracle, p.network_factor, p.network_floor).items():
        assert check, f"{name}: {check.reason}"


def test_the_same_model_gives_the_same_bytes(resnet8: Fused) -> None:
    """That the file takes any batch is told by `judged`, which runs it in two sizes."""
    model, images = resnet8.model, resnet8.images
    first, second = (lower_onnx(fuse(model, images, BATCH), PRECISIONS["fp32"], {}) for _ in range(2))
    assert first.serialize() == second.serialize()


def test_a_static_batch_is_a_fixed_shape(resnet8: Fused) -> None:
    program = fuse(resnet8.model, resnet8.images, Batch(4, 4, 4))
    graph = lower_onnx(program, PRECISIONS["fp16"], {}).model.graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [4, 3, 32, 32]
    assert [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim] == [4, 10]


def test_rounded_copy_rounds_every_value() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(2, 3, 8, 8)
    file = lower_onnx(fuse(model, images, BATCH), PRECISIONS["bf16"], {})
    (hidden,) = rounded_values(file, images, "0")
    assert hidden.dtype == np.float32 and hidden.any()
    assert (hidden.view(np.uint32) & 0xFFFF == 0).all()  # a bfloat16 is a float32 whose lower half is zero
