"""What a bundle says of itself: enough to run it, to reproduce it and to know what was checked."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx

from export.base.machine import installed_versions
from export.base.precision import Precision
from export.forms import Forms
from export.fusion.features import strides
from export.fusion.program import FusedProgram
from export.runtime.bundle.folder import FORMAT
from export.runtime.engines.engine import Engine
from export.runtime.onnx_session import ONNX_FILE
from export.runtime.parity.rungs import ParityReport

if TYPE_CHECKING:
    from export.lowering.kernel_engine import KernelEngine


def describe(
    program: FusedProgram,
    forms: Forms,
    engines: Sequence[Engine],
    precision: Precision,
    metadata: Mapping[str, Any],
    report: ParityReport,
    kernels: Sequence[KernelEngine] = (),
) -> dict[str, Any]:
    """The manifest without its list of files. `metadata` goes under `model`: what only the caller knows.

    Inputs that are bytes have their `layout` and the `normalisation` that the files do to them; outputs that are maps
    of the input have their `stride`, the pixels from one cell to the next in height and width.
    """
    file = forms.files[ONNX_FILE]
    model, normalisation = file.model, file.normalisation
    graph, steps = model.graph, strides(program.source)
    taken = {} if normalisation is None else {"layout": "NHWC", "normalisation": normalisation.to_json()}
    return {
        "format": FORMAT,
        "model": dict(metadata),
        "precision": precision.name,
        "batch": {"min": program.batch.minimum, "opt": program.batch.optimum, "max": program.batch.maximum},
        "inputs": [{**value_facts(value), **taken} for value in graph.input],
        "outputs": [_output_facts(value, report, steps) for value in graph.output],
        "verified": bool(report.evidence),
        "verdict": report.verdict,
        "quick": list(report.quick),
        "opset": model.opset_import[0].version,
        "kept": sorted(forms.kept),
        "engines": {
            engine.flavour.file_name: {
                "flavour": engine.flavour.name,
                "version": engine.version,
                "convolutions": engine.convolutions,
                "build_seconds": round(engine.seconds, 2),
                "options": engine.config.to_json(),
                "gpu": engine.gpu or None,
            }
            for engine in engines
        },
        "kernels": {engine.name: engine.to_json() for engine in kernels},
        "fused": [{"name": o.name, "kind": o.kind, "parts": list(o.parts)} for o in program.coverage.fused],
        "left": [{"name": o.name, "kind": o.kind, "reason": o.reason} for o in program.coverage.left],
        "notes": list(program.coverage.notes),
        "accuracy": [measured.to_json() for measured in report.accuracy],
        "quantisation": report.quantisation and report.quantisation.to_json(),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }


def _output_facts(
    value: onnx.ValueInfoProto, report: ParityReport, steps: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    found = report.evidence.outputs.get(value.name)
    stride = {"stride": list(steps[value.name])} if value.name in steps else {}
    return {**value_facts(value), **stride, **({} if found is None else found.kind.to_json())}


def value_facts(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, shape and type of an input or output; a dimension that varies has a name for its size."""
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
    }
