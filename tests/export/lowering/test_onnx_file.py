"""The ONNX file: standard operators, the right precision, any batch size, nothing about this machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export import Batch, fuse
from export.base.precision import PRECISIONS
from export.fusion.passes import LEVELS
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import OnnxRuntimeRunner
from export.runtime.onnx_session import rounded_copy
from tests.export import networks

BATCH = Batch(1, 4, 8)
ELEMENT = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def resnet50(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor], precision: str) -> OnnxFile:
    program = fuse(calibrated["resnet50"], pictures["resnet50"], BATCH)
    return lower_onnx(program, pictures["resnet50"], PRECISIONS[precision], {"precision": precision})


def test_the_graph_holds_what_a_resnet_needs_and_no_more(resnet50: OnnxFile, precision: str) -> None:
    operators = Counter(node.op_type for node in resnet50.model.graph.node)
    casts = {} if precision == "fp32" else {"Cast": 2}
    trunk = {"Conv": 53, "Relu": 49, "Add": 16, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1}
    assert operators == {**trunk, **casts}
    assert {node.domain for node in resnet50.model.graph.node} == {""}
    assert [entry.domain for entry in resnet50.model.opset_import] == [""]
    assert resnet50.model.opset_import[0].version == (22 if precision == "bf16" else 18)
    assert not resnet50.model.functions


def test_casts_stand_at_the_ends_only(resnet50: OnnxFile, precision: str) -> None:
    nodes = [node.op_type for node in resnet50.model.graph.node]
    if precision != "fp32":
        assert nodes[0] == nodes[-1] == "Cast"
    assert "Cast" not in nodes[1:-1]


def test_precision_is_in_the_graph_and_float32_outside(resnet50: OnnxFile, precision: str) -> None:
    graph = resnet50.model.graph
    for value in [*graph.input, *graph.output]:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    types = {t.data_type for t in graph.initializer if len(t.dims) == 4 or t.name.endswith("bias")}
    assert types == {ELEMENT[precision]}


def test_the_file_is_valid_and_self_contained(resnet50: OnnxFile) -> None:
    onnx.checker.check_model(resnet50.model, full_check=True)
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in resnet50.model.graph.initializer)


def test_the_file_says_nothing_of_this_machine(resnet50: OnnxFile) -> None:
    content = resnet50.serialize()
    for secret in (str(Path.cwd()), str(Path.home()), "site-packages", ".py", "stack_trace"):
        assert secret.encode() not in content


def test_values_and_weights_carry_the_users_names(resnet50: OnnxFile, precision: str) -> None:
    outputs = {name for node in resnet50.model.graph.node for name in node.output}
    weights = {tensor.name for tensor in resnet50.model.graph.initializer}
    for name in ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer3.5.conv2", "layer3.5.conv3"):
        assert name in outputs and f"{name}.weight" in weights and f"{name}.bias" in weights
    projection = "layer4.0.downsample.0"  # its bias is part of layer4.0.conv3's
    assert projection in outputs and f"{projection}.weight" in weights and f"{projection}.bias" not in weights
    assert {"maxpool", "avgpool"} <= outputs and {"fc.weight", "fc.bias"} <= weights
    assert not [name for name in outputs | weights if name.endswith("_1")]
    metadata = {entry.key: entry.value for entry in resnet50.model.metadata_props}
    assert metadata == {"precision": precision}


def test_every_named_value_is_what_its_module_computes(
    resnet50: OnnxFile, precision: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    """Followed by its ReLU, where it has one: the value of the module's BatchNorm, or the block's own."""
    model, computed = calibrated["resnet50"], {}
    modules = {"conv1": "relu", "maxpool": "maxpool", "avgpool": "avgpool"}
    modules |= {"layer2.0.conv1": "layer2.0.bn1", "layer2.0.conv2": "layer2.0.bn2", "layer2.1.conv3": "layer2.1"}
    hooks = [
        model.get_submodule(module).register_forward_hook(
            lambda _m, _x, y, name=name: computed.setdefault(name, y.clone().relu())
        )
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            model(pictures["resnet50"])
    finally:
        for hook in hooks:
            hook.remove()
    copy = rounded_copy(resnet50.model)
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in modules)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(list(modules), {"input": pictures["resnet50"].numpy()})
    for name, value in zip(modules, values, strict=True):
        expected = computed[name].numpy().reshape(value.shape)
        error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
        assert error < 20 * PRECISIONS[precision].roundoff + 1e-5, name


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_the_same_network(
    level: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    program = fuse(calibrated["resnet18"], pictures["resnet18"], BATCH, level)
    model = lower_onnx(program, pictures["resnet18"], PRECISIONS["fp16"], {}).model
    operators = Counter(node.op_type for node in model.graph.node)
    operators.pop("Reshape", None)  # before the head is fused, the mean is reshaped
    assert operators == {"Cast": 2, "Conv": 20, "Relu": 17, "Add": 8, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1}


def test_the_same_model_gives_the_same_bytes(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    def lower() -> bytes:
        program = fuse(calibrated["resnet20"], pictures["resnet20"], BATCH)
        return lower_onnx(program, pictures["resnet20"], PRECISIONS["fp16"], {}).serialize()

    assert lower() == lower()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_batch_size_in_the_range(
    size: int, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    program = fuse(calibrated["resnet20"], pictures["resnet20"], BATCH)
    file = lower_onnx(program, pictures["resnet20"], PRECISIONS["fp32"], {})
    images = pictures["resnet20"][:size]
    with OnnxRuntimeRunner(file, PRECISIONS["fp32"]) as runner:
        outputs = runner.infer({"input": images.numpy()})
    np.testing.assert_allclose(outputs["output"], program(images).numpy(), rtol=1e-3, atol=1e-4)


def test_a_static_batch_is_a_fixed_shape(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    program = fuse(calibrated["resnet20"], pictures["resnet20"], Batch(4, 4, 4))
    graph = lower_onnx(program, pictures["resnet20"], PRECISIONS["fp16"], {}).model.graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [4, 3, 32, 32]
    assert [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim] == [4, 10]


@pytest.mark.parametrize("network", networks.ALL, ids=lambda network: network.__name__)
def test_any_users_model_runs_in_onnx_runtime(
    network: type[nn.Module], precision: str, pictures: dict[str, Tensor]
) -> None:
    images = pictures["resnet20"]
    program = fuse(networks.make(network, images), images, BATCH)
    file = lower_onnx(program, images, PRECISIONS[precision], {})
    with OnnxRuntimeRunner(file, PRECISIONS[precision]) as runner:
        outputs = runner.infer({"input": images[:3].numpy()})
    expected = program(images[:3])
    if isinstance(expected, tuple):
        expected = {f"output_{i}": y for i, y in enumerate(expected)}
    expected = expected if isinstance(expected, dict) else {"output": expected}
    assert list(outputs) == list(expected)
    for name, values in outputs.items():
        reference = expected[name].detach().numpy()
        error = np.linalg.norm(values - reference) / np.linalg.norm(reference)
        assert error < 8 * PRECISIONS[precision].roundoff + 1e-6


def test_rounded_copy_rounds_every_value() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(2, 3, 8, 8)
    program = fuse(model, images, BATCH)
    file = lower_onnx(program, images, PRECISIONS["bf16"], {})
    copy = rounded_copy(file.model)
    copy.graph.output.append(onnx.helper.make_empty_tensor_value_info("0"))
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    (hidden,) = session.run(["0"], {"input": images.numpy()})
    assert hidden.dtype == np.float32 and hidden.any()
    assert (hidden.view(np.uint32) & 0xFFFF == 0).all()  # a bfloat16 is a float32 whose lower half is zero
