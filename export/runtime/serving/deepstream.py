"""A configuration of DeepStream's nvinfer, with the file it builds from or the engine it loads.

nvinfer makes its inputs itself, y = net-scale-factor * (x - offset), with one factor for all channels. Where that is
the network's own normalisation it is left to nvinfer; one of bytes normalises itself, and nvinfer passes pixels on.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from export.base.batch import UINT8
from export.base.errors import ExportError, printable
from export.base.normalisation import Normalisation
from export.runtime.bundle.contents import Bundle
from export.runtime.onnx_session import ONNX_FILE
from export.runtime.onnx_wire import with_float_inputs
from export.runtime.parity.network import VALUES, OutputKind
from export.runtime.serving.folder import MARK, Served, labels, tensorrt_engine

CONFIG, LABELS = "config_infer_primary.txt", "labels.txt"
# nvinfer writes the engine that it builds beside the file, under that one's name. The name of another file has another
# hash in it: an engine that was built from the one before is never taken for this one's.
_OWN = r"config_infer_primary\.txt|labels\.txt|model-[0-9a-f]{12}\.(engine|onnx(_b\d+_gpu\d+_\w+\.engine)?)"
_COLOURS = {1: 2, 3: 0}  # model-color-format: grey, RGB
_MODES = {"fp32": 0, "int8": 1, "fp16": 2}
_CLASSIFIER, _OTHER = 1, 100


def deepstream_config(bundle: Bundle, folder: Path) -> tuple[Served, list[str]]:
    """What a bundle becomes for nvinfer, and what to know of it, a line each.

    Raises:
        ExportError: several inputs, no pictures, a batch that begins above 1; deviations that differ by channel;
            bfloat16 or 8 bits without an engine.
    """
    (*_, last), first = bundle.image_shape, bundle.image_shape[0]
    channels = last if bundle.dtype == UINT8 else first
    if bundle.preprocessing is None:
        wanted = "export it with export_bundle(preprocessing=...)"
        raise ExportError(f"{bundle.path} does not say how pictures are normalised, which nvinfer is to do: {wanted}")
    normalisation = Normalisation.from_json(bundle.preprocessing)
    if channels not in _COLOURS or len(normalisation.mean) != channels:
        raise ExportError(f"{bundle.path}: expected pictures of 1 or 3 channels for nvinfer, got {channels}")
    if bundle.batch.minimum > 1:
        raise ExportError(f"{bundle.path}: nvinfer makes batches of any size, expected one exported with "
                          f"ExportConfig.batch=1:{bundle.batch.optimum}:{bundle.batch.maximum}, "
                          f"got {bundle.batch}")  # fmt: skip
    file, content, notes = _network(bundle)
    properties: dict[str, object] = {
        "gpu-id": 0,
        "onnx-file" if file.endswith(".onnx") else "model-engine-file": file,
        "batch-size": bundle.batch.optimum,
        "model-color-format": _COLOURS[channels],
        **_scaling(bundle, normalisation),
        "maintain-aspect-ratio": 0,
        "process-mode": 1,
        "gie-unique-id": 1,
        **({"network-mode": _MODES[bundle.precision.name]} if bundle.precision.name in _MODES else {}),
        "output-blob-names": ";".join(bundle.outputs),
        "output-tensor-meta": 1,
    }
    files = {file: content}
    output, shape = next(iter(bundle.outputs.items()))
    kind = bundle.kinds.get(output, OutputKind())
    if len(shape) == 2 and kind.kind != VALUES:
        properties |= {"network-type": _CLASSIFIER, "classifier-threshold": 0, "labelfile-path": LABELS}
        files[LABELS] = _labels(bundle)
        if "it is a softmax" not in kind.why:
            notes.append(
                f"{output} holds scores, not probabilities: nvinfer labels no picture whose scores are all 0 or less; "
                "output-tensor-meta hands them on as they are"
            )
    else:
        properties["network-type"] = _OTHER
    lines = [MARK, "# Of full frames; of a detector's objects: process-mode=2, and its number as operate-on-gie-id."]
    lines += ["[property]", *(f"{key}={value}" for key, value in properties.items())]
    files[CONFIG] = ("\n".join(lines) + "\n").encode()
    notes.append(
        f"nvinfer stretches the whole frame to {_size(bundle)}, by a filter of its own: measure the accuracy on frames "
        "that it made"
    )
    return Served(folder, CONFIG, files, _OWN, f"{folder / CONFIG}: nvinfer, with {file}"), notes


def start_command(served: Served) -> str:
    """A pipeline that runs it on a file."""
    config = (served.path / CONFIG).resolve()
    return (
        "gst-launch-1.0 uridecodebin uri=file:///tmp/video.mp4 ! m.sink_0 nvstreammux name=m batch-size=1 width=1920 "
        f"height=1080 ! nvinfer config-file-path={shlex.quote(str(config))} ! fakesink"
    )


def _network(bundle: Bundle) -> tuple[str, bytes, list[str]]:
    """The file that nvinfer loads: its name, its content and what to know of it."""
    if bundle.dtype == UINT8:
        content = with_float_inputs(bundle.contents[ONNX_FILE])
        notes = ["nvinfer feeds pixels as float32: its input is typed so, the rest of the file is the bundle's"]
    else:
        engine, notes = tensorrt_engine(bundle)
        if engine is not None:
            return f"model-{_hash(engine.plan)}.engine", engine.plan, notes
        content = bundle.contents[ONNX_FILE]
    if bundle.precision.name not in ("fp32", "fp16"):
        raise ExportError(f"{bundle.path}: of {bundle.precision.name} nvinfer builds no engine that anybody proved: "
                          f"expected one that was built before, by build_on_device({str(bundle.path)!r}), of a bundle "
                          "that takes float32")  # fmt: skip
    notes.append("nvinfer builds the engine itself when it first starts: nobody proves its precision")
    return f"model-{_hash(content)}.onnx", content, notes


def _scaling(bundle: Bundle, normalisation: Normalisation) -> dict[str, object]:
    """What nvinfer does to a pixel: nothing to those of a network that normalises them itself."""
    if bundle.dtype == UINT8:
        return {"net-scale-factor": 1, "network-input-order": 1}
    if len(set(normalisation.std)) > 1:
        raise ExportError(f"{bundle.path}: nvinfer divides all channels by one number, the standard deviations are "
                          f"{', '.join(f'{s:g}' for s in normalisation.std)}: export with ExportConfig.input='uint8', "
                          "whose file normalises by itself")  # fmt: skip
    return {
        "net-scale-factor": f"{1 / (255 * normalisation.std[0]):.9g}",
        "offsets": ";".join(f"{255 * mean:.9g}" for mean in normalisation.mean),
    }


def _labels(bundle: Bundle) -> bytes:
    """All in one line, as nvinfer wants those of one output."""
    names = labels(bundle) or [f"class {index}" for index in range(bundle.class_count)]
    wrong = [name for name in names if ";" in name]
    if wrong:
        raise ExportError(f"{bundle.path}: nvinfer tells the names of classes apart by semicolons, expected none in "
                          f"{wrong[0]!r:.80}")  # fmt: skip
    return (";".join(map(printable, names)) + "\n").encode()


def _size(bundle: Bundle) -> str:
    shape = bundle.image_shape
    height, width = shape[:2] if bundle.dtype == UINT8 else shape[1:]
    return f"{width} x {height}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
