"""Every name of TensorRT that the project uses, held against the names of each version and of TensorRT-RTX.

tensorrt_api.json lists the public names of the vendor's bindings. The names used are found in the source.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import tensorrt_rtx

from export.runtime.engines.precision_proof import _TYPES

ROOT = Path(__file__).resolve().parents[4]
API = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
VERSIONS = [version for version in API if version != "sources"]

# Per file: the expressions that hold an object of TensorRT, and its class.
OBJECTS = {
    "export/runtime/engines/build_worker.py": {
        "trt": "module", "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
        "options": "IBuilderConfig", "profile": "IOptimizationProfile", "cache": "ITimingCache", "layer": "ILayer",
        "engine": "ICudaEngine", "inspector": "EngineInspector", "context": "IExecutionContext",
        "failure": "ParserError",
    },
    "export/runtime/engines/loader.py": {"trt": "module", "runtime": "Runtime"},
    "export/runtime/engines/precision_proof.py": {
        "trt": "module", "network": "INetworkDefinition", "layer": "ILayer", "producer": "ILayer", "origin": "ILayer",
        "dequantise": "ILayer", "tensor": "ITensor", "source": "ITensor",
    },
    "export/runtime/engines/shape_proof.py": {"network": "INetworkDefinition", "layer": "ILayer", "tensor": "ITensor"},
    "export/runtime/engines/run_worker.py": {
        "self._trt": "module", "self._engine": "ICudaEngine", "self._context": "IExecutionContext",
        "options": "IRuntimeConfig",
    },
}  # fmt: skip

RESULTS = {  # attribute or method -> class of what it gives
    ("ILayer", "get_input"): "ITensor",
    ("ILayer", "get_output"): "ITensor",
    ("ILayer", "type"): "LayerType",
    ("ITensor", "dtype"): "DataType",
    ("INetworkDefinition", "get_layer"): "ILayer",
    ("OnnxParser", "get_error"): "ParserError",
    ("ICudaEngine", "get_tensor_dtype"): "DataType",
    ("ILogger", "Severity"): "ILogger.Severity",
}


# Used only for TensorRT-RTX: targets are refused for the other, and the code asks for CudaGraphStrategy by hasattr.
RTX_ONLY = {
    "ComputeCapability": ["__members__"],
    "CudaGraphStrategy": ["WHOLE_GRAPH_CAPTURE"],
    "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
    "IBuilderConfig": ["num_compute_capabilities", "set_compute_capability"],
    "ICudaEngine": ["create_runtime_config"],
    "IRuntimeConfig": ["cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"],
    "module": ["ComputeCapability", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy"],
}  # fmt: skip


class _Names(ast.NodeVisitor):
    """Collects (class, attribute) wherever an attribute of a TensorRT object is named."""

    def __init__(self, objects: dict[str, str]) -> None:
        self._objects, self.found = objects, set[tuple[str, str]]()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self._class_of(node.value)
        if owner is not None:
            self.found.add((owner, node.attr))
        self.generic_visit(node)

    def _class_of(self, node: ast.expr) -> str | None:
        known = self._objects.get(ast.unparse(node))
        if known is not None:
            return known
        expression = node.func if isinstance(node, ast.Call) else node
        if not isinstance(expression, ast.Attribute):
            return None
        owner = self._class_of(expression.value)
        if owner == "module" and expression.attr[0].isupper():
            return expression.attr  # an enumeration, or a constructor and what it makes
        return RESULTS.get((owner or "", expression.attr))


def used_by(path: str) -> set[tuple[str, str]]:
    names = _Names(OBJECTS[path])
    names.visit(ast.parse((ROOT / path).read_text()))
    return {(owner, name) for owner, name in names.found if name != "__init__"}


# Of the types, which are compared as words, and of every attribute that is named.
USED = {("DataType", name) for name in _TYPES.values()}.union(*map(used_by, OBJECTS))
RTX_ALONE = {(owner, name) for owner, members in RTX_ONLY.items() for name in members}


@pytest.mark.parametrize("path", OBJECTS)
def test_every_object_of_tensorrt_is_found_in_the_source(path: str) -> None:
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    assert OBJECTS[path].keys() <= {ast.unparse(node.value) for node in nodes if isinstance(node, ast.Attribute)}


def test_no_other_file_uses_tensorrt() -> None:
    for path in sorted((ROOT / "export").rglob("*.py")):
        if str(path.relative_to(ROOT)) not in OBJECTS:
            words = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.expr)}
            assert not words & {"trt", "self._trt", "tensorrt", "tensorrt_rtx"}, path


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_the_names_but_those_for_rtx_alone(version: str) -> None:
    """A name that every version has is not for TensorRT-RTX alone."""
    lacking = {(owner, name) for owner, name in USED if name not in API[version].get(owner, ())}
    assert RTX_ALONE >= lacking >= RTX_ALONE - {("ICudaEngine", "create_runtime_config")}
    assert len(USED) > 80 and len(API[version]["module"]) > 100


def test_tensorrt_rtx_has_the_names() -> None:
    for owner, name in sorted(USED):
        found = tensorrt_rtx
        for part in [] if owner == "module" else owner.split("."):
            found = getattr(found, part)
        assert hasattr(found, name), f"{owner}.{name}"


def test_the_versions_are_those_of_jetpack_and_later() -> None:
    assert {version.partition(".")[0] for version in VERSIONS} == {"10", "11"} and "10.3" in VERSIONS
