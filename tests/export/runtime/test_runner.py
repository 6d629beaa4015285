"""What the base class of all runners refuses, and ONNX Runtime's runner: nothing wrong goes in, nothing missing out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export import Batch, ExportError
from export.base.batch import Arrays, Inputs
from export.runtime.onnx_session import OnnxRunner
from export.runtime.runner import Interface, Runner

SHAPES: dict[str, tuple[int | str, ...] | None] = {"logits": ("batch", 5), "classes": None}
INTERFACE = Interface(SHAPES, {"input": (1, 4, 4)}, Batch(2, 2, 3))
X = np.ones((2, 1, 4, 4), np.float32)
PIXELS = {"pixels": (1, 4, 4)}


class Answers(Runner):
    """Gives what is right, changed by a defect."""

    name, runtime = "answers", "numpy"

    def __init__(self, change: Callable[[Arrays], Arrays] = lambda right: right) -> None:
        super().__init__(INTERFACE)
        self._change = change

    def _run(self, inputs: Inputs) -> Arrays:
        x = inputs["input"]
        return self._change({"logits": np.ones((len(x), 5), np.float16), "classes": np.zeros(len(x), np.int64)})


def test_what_is_right_passes_and_is_wide_enough() -> None:
    found = Answers().infer({"input": X})
    assert {name: (y.shape, y.dtype.name) for name, y in found.items()} == {
        "logits": ((2, 5), "float32"),
        "classes": ((2,), "int64"),
    }
    double = Answers(lambda right: right | {"logits": np.full((2, 5), 1 / 3)}).infer({"input": X})["logits"]
    assert double.dtype == np.float64 and double[0, 0] == 1 / 3


OUTPUTS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "none": (lambda right: {}, "answers gives no output: expected logits, classes"),
    "one missing": (lambda right: {"logits": right["logits"]}, "answers gives logits: expected logits, classes"),
    "one too many": (lambda right: right | {"more": right["logits"]}, "gives logits, classes, more: expected"),
    "swapped": (lambda right: dict(reversed(right.items())), "gives classes, logits: expected logits, classes"),
    "an image too few": (lambda right: {n: y[:1] for n, y in right.items()}, r"\[1, 5\]: expected \[2, ...\], the"),
    "transposed": (lambda right: right | {"logits": right["logits"].T}, r"\[5, 2\]: expected \[2, ...\], the batch"),
    "no batch": (lambda right: right | {"classes": np.array(1)}, r"classes has shape \[\]: expected \[2, ...\]"),
    "a class too few": (lambda right: right | {"logits": right["logits"][:, 1:]}, r"\[2, 4\]: expected \['batch', 5\]"),
}


@pytest.mark.parametrize("defect", OUTPUTS)
def test_other_outputs_than_the_networks_are_refused(defect: str) -> None:
    change, reason = OUTPUTS[defect]
    with pytest.raises(ExportError, match=reason):
        Answers(change).infer({"input": X})


INPUTS: dict[str, tuple[dict[str, NDArray], str]] = {
    "none": ({}, "answers: expected one input 'input', got none"),
    "another name": ({"x": X}, "expected one input 'input', got x"),
    "two": ({"input": X, "x": X}, "expected one input 'input', got input, x"),
    "double": ({"input": X.astype(np.float64)}, "expected inputs of type float32, got float64"),
    "another size": ({"input": X[:, :, :3]}, r"shape \[N, \*\[1, 4, 4\]\], got \[2, 1, 3, 4\]"),
    "no batch": ({"input": X[0]}, r"shape \[N, \*\[1, 4, 4\]\], got \[1, 4, 4\]"),
    "too few": ({"input": X[:1]}, "expected a batch of 2:2:3 images, got 1"),
    "too many": ({"input": np.repeat(X, 2, axis=0)}, "expected a batch of 2:2:3 images, got 4"),
}


@pytest.mark.parametrize("defect", INPUTS)
def test_what_the_network_does_not_take_is_not_run(defect: str) -> None:
    inputs, reason = INPUTS[defect]
    with pytest.raises(ExportError, match=reason):
        Answers(lambda right: pytest.fail("it ran")).infer(inputs)


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16"])
def test_an_onnx_file_runs_by_its_own_names_and_says_why_it_does_not(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(onnx.TensorProto, kind)
    x, y = (onnx.helper.make_tensor_value_info(name, number, ["n", 1, 4, 4]) for name in ("pixels", "twice"))
    shape = onnx.numpy_helper.from_array(np.array([2, 1, 4, 4]), "shape")
    nodes = [
        onnx.helper.make_node("Add", ["pixels", "pixels"], ["sum"]),
        onnx.helper.make_node("Reshape", ["sum", "shape"], ["twice"]),  # fails for another batch than 2
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [shape])
    content = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    with OnnxRunner(content.SerializeToString, Interface.of(["twice"], PIXELS)) as runner:
        first, second = (runner.infer({"pixels": x})["twice"] for x in (X, 3 * X))
        assert first.dtype == np.float32 and (first == 2).all() and (second == 6).all()
        with pytest.raises(ExportError, match=r"^onnx does not run: .*ONNXRuntimeError"):
            runner.infer({"pixels": X[:1]})
        monkeypatch.setattr(runner, "step", lambda: [])
        with pytest.raises(ExportError, match=r"^onnx gives 0 outputs: expected twice"):
            runner.infer({"pixels": X})
    with (
        OnnxRunner(content.SerializeToString, Interface.of(["logits"], PIXELS)) as runner,
        pytest.raises(ExportError, match=r"^onnx does not run: .*logits"),
    ):
        runner.infer({"pixels": X})
