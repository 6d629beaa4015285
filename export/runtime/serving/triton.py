"""A model repository of Triton Inference Server: a folder for each of its models, with a config.pbtxt.

The fields are those of the server's model_config.proto.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from export.base.batch import FLOAT32, Batch
from export.base.errors import ExportError, printable
from export.runtime.bundle.contents import Bundle
from export.runtime.onnx_session import CPU_ONNX_FILE, ONNX_FILE
from export.runtime.serving.folder import MARK, Served, labels, tensorrt_engine

CONFIG, LABELS = "config.pbtxt", "labels.txt"
_OWN = rf"{re.escape(CONFIG)}|{re.escape(LABELS)}|1/model\.(onnx|plan)"
_TYPES = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
_CONTAINER = "nvcr.io/nvidia/tritonserver:25.06-py3"


def triton_models(bundle: Bundle, repository: Path) -> tuple[list[Served], list[str]]:
    """What a bundle becomes in a model repository, and a line for each file that does not become a model.

    The ONNX file is for the onnxruntime backend, of an int8 bundle the one for CPUs; a TensorRT engine, if there is
    one, for the tensorrt backend.

    Raises:
        ExportError: no file of the bundle is for either, or an output has a shape that cannot be said.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", bundle.path.resolve().name).lstrip(".") or "model"
    engine, notes = tensorrt_engine(bundle)
    models = []
    if bundle.precision.name == "bf16":
        notes.append(f"{ONNX_FILE} is left out: ONNX Runtime has no bfloat16 arithmetic on CPUs")
    else:
        file = CPU_ONNX_FILE if CPU_ONNX_FILE in bundle.contents else ONNX_FILE
        kind = "KIND_CPU" if file == CPU_ONNX_FILE else "KIND_AUTO"
        models.append(_model(bundle, repository / name, "onnxruntime", "model.onnx", bundle.contents[file], kind, file))
    if engine is not None:
        folder, what = repository / f"{name}_tensorrt", f"the engine of TensorRT {engine.version}"
        models.append(_model(bundle, folder, "tensorrt", "model.plan", engine.plan, "KIND_GPU", what))
        notes.append(f"{folder.name} needs a server whose TensorRT is {engine.version}, on a GPU like the engine's own")
    if not models:
        raise ExportError(f"{bundle.path}: expected a file for Triton; {'; '.join(notes)}; "
                          f"build an engine first: build_on_device({str(bundle.path)!r})")  # fmt: skip
    return models, notes


def start_commands(models: Sequence[Served]) -> list[str]:
    """What starts a server of these models: in NVIDIA's container, then where tritonserver is installed."""
    repository = models[0].path.parent
    on_gpu = not all(b"KIND_CPU" in model.files[CONFIG] for model in models)
    container = [
        *("docker", "run", "--rm"),
        *(["--gpus", "all"] if on_gpu else []),
        *("-p", "8000:8000", "-p", "8001:8001", "-v", f"{repository.resolve()}:/models:ro", _CONTAINER),
    ]
    places = ("/models", str(repository))
    inside, here = (["tritonserver", f"--model-repository={place}"] for place in places)
    return [shlex.join([*container, *inside]), shlex.join(here)]


def _model(
    bundle: Bundle, folder: Path, backend: str, file: str, content: bytes, instances: str, origin: str
) -> Served:
    names, batch = labels(bundle), bundle.batch
    batching = batch.minimum == 1 and not batch.static
    config = [MARK, f"name: {_text(folder.name)}", f"backend: {_text(backend)}"]
    config += [f"max_batch_size: {batch.maximum if batching else 0}"]
    inputs = []
    for name, shape in bundle.inputs.items():
        dims = shape if batching else (_batch_size(batch), *shape)
        inputs.append(f"name: {_text(name)} data_type: {_data_type(bundle.dtype)} dims: {_numbers(dims)}")
    config += [f"input [ {{ {facts} }} ]" for facts in inputs]
    for entry in bundle.manifest["outputs"]:
        name, dims = str(entry["name"]), _output_dims(str(entry["name"]), bundle, batching)
        facts = f"name: {_text(name)} data_type: {_data_type(entry.get('dtype', FLOAT32))} dims: {_numbers(dims)}"
        if names is not None and name == next(iter(bundle.outputs)):
            facts += f" label_filename: {_text(LABELS)}"
        config.append(f"output [ {{ {facts} }} ]")
    if batching:
        # an engine's kernels were chosen for this size; ONNX Runtime prefers none
        preferred = f" preferred_batch_size: [ {batch.optimum} ]" if backend == "tensorrt" else ""
        config.append(f"dynamic_batching {{{preferred} }}")
    config.append(f"instance_group [ {{ count: 1 kind: {instances} }} ]")
    for size in sorted({1, batch.optimum, batch.maximum} if batching else {1}):
        config.append(_warm_up(bundle, size, batching))
    files = {CONFIG: ("\n".join(config) + "\n").encode(), f"1/{file}": content}
    if names is not None:
        files[LABELS] = "".join(f"{printable(name)}\n" for name in names).encode()
    sizes = f"batches of 1 to {batch.maximum}, collected" if batching else f"requests of {_sizes(batch)}"
    return Served(folder, CONFIG, files, _OWN, f"{folder}: {origin}, for the {backend} backend; {sizes}")


def _warm_up(bundle: Bundle, size: int, batching: bool) -> str:
    """A request of so many images, all zero, before the model is ready."""
    whole = () if batching else (bundle.batch.optimum,)
    facts = [
        f"inputs {{ key: {_text(name)} value {{ data_type: {_data_type(bundle.dtype)} "
        f"dims: {_numbers((*whole, *shape))} zero_data: true }} }}"
        for name, shape in bundle.inputs.items()
    ]
    return f"model_warmup [ {{ name: {_text(f'batch of {size}')} batch_size: {size} {' '.join(facts)} }} ]"


def _output_dims(name: str, bundle: Bundle, batching: bool) -> tuple[int, ...]:
    first, *rest = bundle.outputs[name]
    if not all(isinstance(size, int) for size in rest) or first not in (bundle.batch.minimum, "batch"):
        raise ExportError(f"{bundle.path}: expected an output of shape [batch, ...], got {name} "
                          f"{list(bundle.outputs[name])}")  # fmt: skip
    dims = tuple(int(size) for size in rest)
    return dims if batching else (_batch_size(bundle.batch), *dims)


def _batch_size(batch: Batch) -> int:
    """Of requests that are whole batches; the server's -1 where more than one size will do."""
    return batch.minimum if batch.static else -1


def _sizes(batch: Batch) -> str:
    return f"{batch.minimum} at once" if batch.static else f"{batch.minimum} to {batch.maximum} at once, not collected"


def _data_type(name: str) -> str:
    if name not in _TYPES:
        raise ExportError(f"expected inputs and outputs of {', '.join(_TYPES)} for Triton, got {name:.80}")
    return f"TYPE_{_TYPES[name]}"


def _numbers(values: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"


def _text(value: str) -> str:
    """A string of the protocol buffers' text format."""
    return json.dumps(value, ensure_ascii=False)
