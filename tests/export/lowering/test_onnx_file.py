"""The ONNX file: standard operators, the right precision, any batch size, nothing about this machine."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
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
from export.fusion.passes import LEVELS
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import OnnxRuntimeRunner
from export.runtime.onnx_session import rounded_copy
from export.runtime.parity.ladder import FOLDED_FACTOR
from export.runtime.parity.network import compare
from tests.conftest import Made
from tests.export.networks import BATCH

ELEMENT = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
TRUNK = {"Conv": 20, "Relu": 16, "Add": 5, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1}


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def files(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> Mapping[str, OnnxFile]:
    """A network of bottlenecks, by precision."""
    images = pictures["bottleneck"]
    program = fuse(calibrated["bottleneck"], images, BATCH)
    return Made(lambda name: lower_onnx(program, images, PRECISIONS[name], {"precision": name}))


@pytest.fixture
def file(files: Mapping[str, OnnxFile], precision: str) -> OnnxFile:
    return files[precision]


def test_the_graph_holds_what_a_resnet_needs_and_no_more(file: OnnxFile, precision: str) -> None:
    nodes = [node.op_type for node in file.model.graph.node]
    assert Counter(nodes) == TRUNK | ({} if precision == "fp32" else {"Cast": 2})
    assert precision == "fp32" or nodes[0] == nodes[-1] == "Cast"
    assert {node.domain for node in file.model.graph.node} == {""} and not file.model.functions
    (opset,) = file.model.opset_import
    assert (opset.domain, opset.version) == ("", 22 if precision == "bf16" else 18)


def test_precision_is_in_the_graph_and_float32_outside(file: OnnxFile, precision: str) -> None:
    graph = file.model.graph
    for value in [*graph.input, *graph.output]:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    types = {t.data_type for t in graph.initializer if len(t.dims) == 4 or t.name.endswith("bias")}
    assert types == {ELEMENT[precision]}


def test_the_file_is_valid_and_self_contained_and_says_nothing_of_this_machine(file: OnnxFile) -> None:
    onnx.checker.check_model(file.model, full_check=True)
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in file.model.graph.initializer)
    content = file.serialize()
    for secret in (str(Path.cwd()), str(Path.home()), "site-packages", ".py", "stack_trace"):
        assert secret.encode() not in content


def test_values_and_weights_carry_the_users_names(file: OnnxFile, precision: str) -> None:
    outputs = {name for node in file.model.graph.node for name in node.output}
    weights = {tensor.name for tensor in file.model.graph.initializer}
    for name in ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv3", "layer3.0.conv2", "layer3.0.conv3"):
        assert name in outputs and f"{name}.weight" in weights and f"{name}.bias" in weights
    projection = "layer4.0.downsample.0"  # its bias is part of layer4.0.conv3's
    assert projection in outputs and f"{projection}.weight" in weights and f"{projection}.bias" not in weights
    assert {"maxpool", "avgpool"} <= outputs and {"fc.weight", "fc.bias"} <= weights
    assert not [name for name in outputs | weights if name.endswith("_1")]
    metadata = {entry.key: entry.value for entry in file.model.metadata_props}
    assert metadata == {"precision": precision}


MODULES = {"conv1": "relu", "maxpool": "maxpool", "avgpool": "avgpool", "layer1.1.conv3": "layer1.1"}
MODULES |= {"layer2.0.conv1": "layer2.0.bn1", "layer2.0.conv2": "layer2.0.bn2"}


def computed(model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, NDArray]:
    """What modules compute, followed by a ReLU: by the names that the file has for that."""
    model, found = copy.deepcopy(model).to(dtype), dict[str, NDArray]()

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, y: Tensor) -> None:
            found[name] = y.clone().relu().double().numpy()

        return hook

    for name, module in MODULES.items():
        model.get_submodule(module).register_forward_hook(keep(name))
    with torch.no_grad():
        model(images.to(dtype))
    return found


def test_every_named_value_is_what_its_module_computes(
    file: OnnxFile, precision: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    """But for what rounding makes of the module itself."""
    p, model, images = PRECISIONS[precision], calibrated["bottleneck"], pictures["bottleneck"]
    shown = rounded_copy(file.model)
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in MODULES)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    oracle, rounded = (computed(model, images, dtype) for dtype in (torch.float64, p.dtype))
    values = session.run(list(MODULES), {"input": images.numpy()})
    got = {name: value.reshape(oracle[name].shape) for name, value in zip(MODULES, values, strict=True)}
    for name, check in compare(got, [rounded], oracle, FOLDED_FACTOR, p.network_floor).items():
        assert check, f"{name}: {check.reason}"


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_the_same_network(
    level: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    program = fuse(calibrated["basic"], pictures["basic"], BATCH, level)
    model = lower_onnx(program, pictures["basic"], PRECISIONS["fp16"], {}).model
    operators = Counter(node.op_type for node in model.graph.node)
    operators.pop("Reshape", None)  # before the head is fused, the mean is reshaped
    assert operators == {"Cast": 2, "Conv": 12, "Relu": 9, "Add": 4, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1}


def test_the_same_model_gives_the_same_bytes_that_take_any_batch(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    p, images, model = PRECISIONS["fp32"], pictures["resnet8"], calibrated["resnet8"]
    first, second = (lower_onnx(fuse(model, images, BATCH), images, p, {}) for _ in range(2))
    assert first.serialize() == second.serialize()
    oracle, rounded = ({"output": computed_whole(model, images, dtype)} for dtype in (torch.float64, torch.float32))
    with OnnxRuntimeRunner(first, p) as runner:
        for size in (1, 3, 8):
            outputs = runner.infer({"input": images[:size].numpy()})
            (check,) = compare(
                outputs, [{"output": rounded["output"][:size]}], {"output": oracle["output"][:size]},
                p.network_factor, p.network_floor,
            ).values()  # fmt: skip
            assert check, check.reason


def computed_whole(model: nn.Module, images: Tensor, dtype: torch.dtype) -> NDArray[np.float64]:
    with torch.no_grad():
        return copy.deepcopy(model).to(dtype)(images.to(dtype)).double().numpy()


def test_a_static_batch_is_a_fixed_shape(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    program = fuse(calibrated["resnet8"], pictures["resnet8"], Batch(4, 4, 4))
    graph = lower_onnx(program, pictures["resnet8"], PRECISIONS["fp16"], {}).model.graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [4, 3, 32, 32]
    assert [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim] == [4, 10]


def test_rounded_copy_rounds_every_value() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(2, 3, 8, 8)
    shown = rounded_copy(lower_onnx(fuse(model, images, BATCH), images, PRECISIONS["bf16"], {}).model)
    shown.graph.output.append(onnx.helper.make_empty_tensor_value_info("0"))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    (hidden,) = session.run(["0"], {"input": images.numpy()})
    assert hidden.dtype == np.float32 and hidden.any()
    assert (hidden.view(np.uint32) & 0xFFFF == 0).all()  # a bfloat16 is a float32 whose lower half is zero
