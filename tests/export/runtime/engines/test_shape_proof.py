"""What a runtime makes of a file has the shapes of the file, and pools are written so that it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from export import Batch, ExportError, fuse
from export.base.precision import PRECISIONS
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import TracedOnnxRunner
from export.runtime.engines.engine import FLAVOURS, build_engine, import_flavour
from export.runtime.engines.shape_proof import prove_shapes
from export.runtime.onnx_session import rounded_copy
from export.runtime.onnx_wire import value_shapes

RTX, FP32, BATCH = FLAVOURS["tensorrt-rtx"], PRECISIONS["fp32"], Batch(1, 2, 4)


class Pools(nn.Module):
    """Pools of each kind that runtimes were seen to differ in, by name."""

    def __init__(self) -> None:
        super().__init__()
        geometries = [(2, 2, 1), (2, 3, 0), (3, 2, 1), (5, 3, 2)]
        self.largest: list[Any] = [(*g, 1, True) for g in geometries] + [(2, None, 0, 1, True)]
        counts: list[Any] = [(True, None), (False, None), (True, 7)]
        self.averages: list[Any] = [(*g, True, *c) for g in geometries for c in counts]
        self.averages += [(3, 2, 1, False, True, 5), ((3, 2), (2, 3), (1, 0), True)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        largest = {f"max{i}": F.max_pool2d(x, *a) for i, a in enumerate(self.largest)}
        sizes: list[tuple[int, int]] = [(1, 1), (1, 13), (11, 1)]
        largest |= {f"adaptive{i}": F.adaptive_max_pool2d(x, size) for i, size in enumerate(sizes)}
        return largest | {f"average{i}": F.avg_pool2d(x, *a) for i, a in enumerate(self.averages)}


@pytest.fixture(scope="module")
def trt() -> Any:
    return import_flavour(RTX)


def prove(trt: Any, content: bytes) -> None:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(content)
    prove_shapes(network, content)


def test_every_pool_has_pytorchs_windows_and_values_everywhere(trt: Any) -> None:
    model, x = Pools().eval(), torch.randn(2, 3, 11, 13, generator=torch.Generator().manual_seed(0))
    file = lower_onnx(fuse(model, x, BATCH), FP32, {})
    with TracedOnnxRunner(file, FP32) as runner:
        found = runner.infer({"input": x.numpy()})
    wrong = [name for name, y in model(x).items() if found[name].shape != y.shape]
    assert not wrong
    assert not [name for name, y in model(x).items() if np.abs(found[name] - y.numpy()).max() > 1e-5]
    written = [a for node in file.model.graph.node for a in node.attribute if a.name == "ceil_mode"]
    assert written and not any(a.i for a in written)
    prove(trt, file.serialize())


def pooling(shape: Any, **attributes: Any) -> bytes:
    """A file with one max-pool of 2x2 and stride 2 on 17x17, whose output is said to have a shape."""
    node = helper.make_node(
        "MaxPool", ["input"], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2], **attributes
    )
    given: dict[str, Any] = {"input": ["N", 3, 17, 17], "pooled": shape}
    values = [helper.make_tensor_value_info(name, 1, sizes) for name, sizes in given.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def test_an_engine_of_other_shapes_is_refused_in_words(trt: Any) -> None:
    """The last of 10 windows lies wholly in the padding: PyTorch and ONNX Runtime drop it."""
    content = pooling(["N", 3, 9, 9], pads=[1, 1, 1, 1], ceil_mode=1)
    words = (
        r"^pool \(POOLING\) would give pooled the shape \[N, 3, 10, 10\]: expected \[N, 3, 9, 9\], as in the ONNX file$"
    )
    with pytest.raises(ExportError, match=words):
        build_engine(content, RTX, FP32, BATCH, {"input": (3, 17, 17)})
    for known in (["N", 3, 8, 8], ["N", 3, "H", 8], [None, None, None, None], None):
        prove(trt, pooling(known))
    with pytest.raises(ExportError, match=r"expected \[N, 3, 8\]"):
        prove(trt, pooling(["N", 3, 8]))


def test_windows_that_onnx_does_not_have_are_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveMaxPool2d((1, 5))).eval(), torch.randn(2, 3, 11, 13)
    with pytest.raises(ExportError, match=r"as ONNX: adaptive_max_pool2d of 11 x 13 to 1 x 5: expected sizes that"):
        lower_onnx(fuse(model, x, BATCH), FP32, {})


def test_what_the_parser_refuses_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"cannot parse the ONNX file: pool \(MaxPool\): .*dilations"):
        build_engine(pooling(["N", 3, 8, 8], dilations=[2, 2]), RTX, FP32, BATCH, {"input": (3, 17, 17)})


def test_shapes_are_read_from_the_bytes_as_onnx_reads_them() -> None:
    model = onnx.load_model_from_string(pooling(["N", 3, 8, 8]))
    model.graph.value_info.append(helper.make_tensor_value_info("scalar", 1, []))
    model.graph.value_info.append(helper.make_tensor_value_info("large", 1, [1 << 40, None, 0]))
    assert value_shapes(model.SerializeToString()) == {
        "input": (None, 3, 17, 17), "pooled": (None, 3, 8, 8), "scalar": (), "large": (1 << 40, None, 0)
    }  # fmt: skip


def test_a_file_whose_shapes_onnx_does_not_infer_is_refused_in_one_line() -> None:
    wrong = onnx.load_model_from_string(pooling(["N", 3, 9, 9], pads=[1, 1, 1, 1], ceil_mode=1))
    with pytest.raises(ExportError, match=r"shapes that ONNX does not infer: .*MaxPool, node name: pool"):
        rounded_copy(wrong)
