"""Bundles of a network that reads handwritten digits, written without the comparison that other tests are about."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import Batch, ExportConfig, ExportResult, FusedProgram, export_bundle, fuse
from export.base.batch import UINT8
from export.base.precision import PRECISIONS
from export.base.progress import silent
from export.forms import floating_forms
from export.manifest import describe
from export.runtime.bundle.folder import publish, read_verified, staged
from export.runtime.onnx_session import ONNX_FILE
from export.runtime.parity.rungs import Evidence, ParityReport
from resnet.data.labelled import LabelledInputs
from resnet.data.preprocessing import Preprocessing
from resnet.data.sources import open_test

# With 0.5 and 0.5 each pixel lies on a tie of the 8-bit input of CPUs, where float32 rounds to either side.
PREPROCESSING = Preprocessing((16, 16), (16, 16), (0.31,), (0.4,))
CLASSES = [str(digit) for digit in range(10)]
METADATA = {"preprocessing": PREPROCESSING.to_json(), "classes": CLASSES}
EXAMPLE = torch.zeros(1, 1, 16, 16)
BATCH = Batch(1, 4, 8)
Change = Callable[[dict[str, Any], dict[str, bytes]], None]  # of a manifest and the files of a bundle


def held_out() -> LabelledInputs:
    return LabelledInputs(open_test("digits"), PREPROCESSING)


def held_out_arrays() -> tuple[NDArray, NDArray]:
    """The same, all inputs and labels at once, prepared by plain numpy and Pillow."""
    data = open_test("digits")
    pictures = [np.asarray(data.picture(i).resize((16, 16), 2), np.float32) for i in range(len(data))]
    return (np.stack(pictures)[:, None] / 255 - 0.31) / 0.4, data.labels


def with_swapped_classes(model: nn.Module) -> nn.Module:
    """The network with the logits of 3 and 8 exchanged."""
    swapped: Any = copy.deepcopy(model)
    order = torch.arange(10)
    order[[3, 8]] = order[[8, 3]]
    with torch.no_grad():
        for parameter in (swapped.fc.weight, swapped.fc.bias):
            parameter.copy_(parameter[order])
    return swapped


def fused(model: nn.Module, batch: Batch = BATCH) -> FusedProgram:
    return fuse(model, EXAMPLE, batch)


def write(program: FusedProgram, output: Path, precision: str = "fp32", metadata: Mapping[str, Any] = METADATA) -> Path:
    forms = floating_forms(program, PRECISIONS[precision], silent)
    report = ParityReport(precision, 0, Evidence(()), ())
    manifest = describe(program, forms, [], PRECISIONS[precision], metadata, report)
    with staged(output) as staging:
        publish(staging, output, {ONNX_FILE: forms.files[ONNX_FILE].serialize()}, manifest)
    return output


def export(
    model: nn.Module, images: Tensor, output: Path, metadata: Mapping[str, Any] = METADATA, **settings: Any
) -> ExportResult:
    """An export without an engine in fp16, but for `settings`: fields of ExportConfig, and arguments of its own.

    Where `metadata` says how pictures are prepared they are so, as bytes for artefacts that take those.
    """
    own = ("labelled", "calibration", "preprocessing", "progress")
    arguments = {name: settings.pop(name) for name in own if name in settings}
    if "preprocessing" in metadata:
        as_bytes = settings.get("input") == UINT8
        arguments = {"preprocessing": replace(PREPROCESSING, as_bytes=as_bytes), **arguments}
    metadata = {name: fact for name, fact in metadata.items() if name != "preprocessing"}
    config = ExportConfig(**{"precision": "fp16", "batch": BATCH, "engine": "none", **settings})
    return export_bundle(model, EXAMPLE, output, config, images=images, metadata=metadata, **arguments)


def rewrite(bundle: Path, output: Path, change: Change) -> Path:
    """A copy that is whole, but whose manifest and files were changed before they were written."""
    manifest, files = read_verified(bundle)
    change(manifest, files)
    with staged(output) as staging:
        publish(staging, output, files, manifest)
    return output


def add_engine(file: str, flavour: str, version: str, plan: bytes = b"no plan") -> Change:
    """For `rewrite`: the bundle has, and its manifest lists, an engine that never ran."""
    facts = {"flavour": flavour, "version": version, "convolutions": 21, "build_seconds": 1.0, "gpu": None}

    def add(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        manifest["engines"][file], files[file] = facts, plan

    return add


def change_onnx(change: Callable[[onnx.ModelProto], None]) -> Change:
    """For `rewrite`."""

    def rewritten(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        model = onnx.load_model_from_string(files[ONNX_FILE])
        change(model)
        files[ONNX_FILE] = model.SerializeToString()

    return rewritten


def without_torch(folder: Path, *others: str) -> dict[str, str]:
    """Environment variables under which no Python process can import PyTorch and what needs it, nor `others`."""
    folder.mkdir(exist_ok=True)
    hidden = ("torch", "triton", "onnxscript", "tensorrt", "tensorrt_rtx", *others)
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {hidden}:\n"
        "            raise ModuleNotFoundError(f'{name} is hidden', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    return {"PYTHONPATH": str(folder)}
