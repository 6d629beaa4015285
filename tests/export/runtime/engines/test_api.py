"""Every name of TensorRT that the project uses, held against the names of each version and of TensorRT-RTX.

tensorrt_api.json lists the public names of the vendor's bindings. The names used are found in the source; the list here
is what they must be, so that a new one is looked at.
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
    },
    "export/runtime/engines/loader.py": {"trt": "module", "runtime": "Runtime"},
    "export/runtime/engines/precision_proof.py": {
        "trt": "module", "network": "INetworkDefinition", "layer": "ILayer", "producer": "ILayer", "origin": "ILayer",
        "dequantise": "ILayer", "tensor": "ITensor", "source": "ITensor",
    },
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

USED = {
    "Builder": ["build_serialized_network", "create_builder_config", "create_network",
        "create_optimization_profile", "num_DLA_cores"],
    "BuilderFlag": ["GPU_FALLBACK", "TF32", "VERSION_COMPATIBLE"],
    "DataType": ["BF16", "FLOAT", "HALF", "INT8", "name"],
    "DeviceType": ["DLA"],
    "EngineInspector": ["execution_context", "get_engine_information"],
    "HardwareCompatibilityLevel": ["AMPERE_PLUS"],
    "IBuilderConfig": ["DLA_core", "add_optimization_profile", "builder_optimization_level", "can_run_on_DLA",
        "clear_flag", "create_timing_cache", "default_device_type", "hardware_compatibility_level",
        "profiling_verbosity", "set_flag", "set_memory_pool_limit", "set_timing_cache"],
    "ICudaEngine": ["create_engine_inspector", "create_execution_context", "get_tensor_dtype", "get_tensor_mode",
        "get_tensor_name", "get_tensor_profile_shape", "num_io_tensors"],
    "IExecutionContext": ["execute_async_v3", "get_tensor_shape", "set_input_shape", "set_tensor_address"],
    "ILayer": ["get_input", "get_output", "name", "num_inputs", "num_outputs", "type"],
    "ILogger": ["Severity"],
    "ILogger.Severity": ["ERROR", "INTERNAL_ERROR"],
    "INetworkDefinition": ["get_flag", "get_layer", "num_layers"],
    "IOptimizationProfile": ["set_shape"],
    "ITensor": ["dtype", "name"],
    "ITimingCache": ["serialize"],
    "LayerInformationFormat": ["JSON"],
    "LayerType": ["CONSTANT", "CONVOLUTION", "DECONVOLUTION", "DEQUANTIZE", "MATRIX_MULTIPLY", "QUANTIZE", "name"],
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "OnnxParser": ["get_error", "num_errors", "parse"],
    "ParserError": ["desc"],
    "ProfilingVerbosity": ["DETAILED"],
    "Runtime": ["DLA_core", "deserialize_cuda_engine", "engine_host_code_allowed"],
    "TensorIOMode": ["OUTPUT"],
    "module": ["Builder", "BuilderFlag", "DataType", "DeviceType", "HardwareCompatibilityLevel", "ILogger",
        "LayerInformationFormat", "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser",
        "ProfilingVerbosity", "Runtime", "TensorIOMode", "__version__"],
}  # fmt: skip

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


def used_by_the_source() -> set[tuple[str, str]]:
    found = {("DataType", name) for name in _TYPES.values()}  # which are compared as words
    for path, objects in OBJECTS.items():
        names = _Names(objects)
        names.visit(ast.parse((ROOT / path).read_text()))
        found |= names.found
    return {(owner, name) for owner, name in found if name != "__init__"}


def pairs(names: dict[str, list[str]]) -> set[tuple[str, str]]:
    return {(owner, name) for owner, members in names.items() for name in members}


def test_the_names_used_are_those_that_were_looked_at() -> None:
    assert used_by_the_source() == pairs(USED) | pairs(RTX_ONLY)


def test_no_other_file_uses_tensorrt() -> None:
    for path in sorted((ROOT / "export").rglob("*.py")):
        if str(path.relative_to(ROOT)) not in OBJECTS:
            words = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.expr)}
            assert not words & {"trt", "self._trt", "tensorrt", "tensorrt_rtx"}, path


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_the_names(version: str) -> None:
    assert version.startswith(("10.", "11.")) and len(API[version]["module"]) > 100
    assert not [(owner, name) for owner, name in sorted(pairs(USED)) if name not in API[version].get(owner, ())]


def test_the_versions_are_those_of_jetpack_and_later() -> None:
    assert {version.partition(".")[0] for version in VERSIONS} == {"10", "11"} and "10.3" in VERSIONS


def test_tensorrt_rtx_has_the_names() -> None:
    for owner, name in sorted(pairs(USED) | pairs(RTX_ONLY)):
        found = tensorrt_rtx
        for part in [] if owner == "module" else owner.split("."):
            found = getattr(found, part)
        assert hasattr(found, name), f"{owner}.{name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_used_for_rtx_alone_is_what_a_version_lacks(version: str) -> None:
    """A name that every version has belongs in the other list, where it is checked."""
    lacking = {pair for pair in pairs(RTX_ONLY) if pair[1] not in API[version].get(pair[0], ())}
    assert lacking >= pairs(RTX_ONLY) - {("ICudaEngine", "create_runtime_config")}
