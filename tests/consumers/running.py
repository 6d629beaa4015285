"""Run one ONNX file in one runtime of others, in a process and an environment of its own: numpy and that runtime alone.

`running.py RUNTIME FILE INPUTS.npy OUTPUTS.npy` writes what the runtime computes of [N, 1, 16, 16] float32. What it
says of a file that it does not take is on stderr.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def onnxruntime(file: Path, x: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


def openvino(file: Path, x: Any, options: dict[str, str] | None = None) -> Any:
    import openvino

    return openvino.Core().compile_model(file, "CPU", options or {})({"input": x})[0]


def openvino_single(file: Path, x: Any) -> Any:
    return openvino(file, x, {"INFERENCE_PRECISION_HINT": "f32"})


def ncnn(file: Path, x: Any) -> Any:
    import ncnn

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        model.write_bytes(file.read_bytes())
        shape = f"inputshape=[1,{','.join(map(str, x.shape[1:]))}]"
        package = importlib.util.find_spec("pnnx")  # imported, it would want PyTorch
        if package is None or package.origin is None:
            raise SystemExit("pnnx is not installed")
        command = [str(Path(package.origin).parent / "pnnx"), str(model), shape, "fp16=0"]
        said = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
        net = ncnn.Net()
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, option, False)
        if not (model.with_suffix(".ncnn.param")).exists():
            raise SystemExit(f"pnnx: {last_line(said.stdout + said.stderr)}")
        if net.load_param(str(model.with_suffix(".ncnn.param"))) or net.load_model(str(model.with_suffix(".ncnn.bin"))):
            kinds = [line.split()[0] for line in model.with_suffix(".ncnn.param").read_text().splitlines()[2:]]
            left = [kind for kind in dict.fromkeys(kinds) if "." in kind]  # pnnx's names, which ncnn does not know
            raise SystemExit(f"pnnx reports success and leaves {', '.join(left)}, which ncnn does not know")
        found = []
        for image in x:
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(image).clone())
            found.append(np.array(extractor.extract("out0")[1]))
        return np.stack(found)


def mnn(file: Path, x: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.mnn"
        converter = str(Path(sys.executable).parent / "mnnconvert")
        command = [converter, "-f", "ONNX", "--modelFile", str(file), "--MNNModel", str(model), "--bizCode", "x"]
        said = subprocess.run(command, check=False, capture_output=True, text=True)
        if said.returncode or not model.exists():
            raise SystemExit(f"its converter: {last_line(said.stdout + said.stderr)}")
        import MNN.expr as expressions
        import MNN.nn as networks

        network = networks.load_module_from_file(str(model), ["input"], ["output"])
        outputs = network.forward([expressions.const(x, list(x.shape), expressions.NCHW)])
        if not outputs:
            raise SystemExit("it converts, and then gives no output")
        return np.array(outputs[0].read())


def tract(file: Path, x: Any) -> Any:
    import tract

    return tract.onnx().load(str(file)).into_model().into_runnable().run([x])[0].to_numpy()


def tensorrt_rtx(file: Path, x: Any) -> Any:
    """Parsed and built, which needs no GPU; there is nothing to compare."""
    import tensorrt_rtx as trt

    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse(file.read_bytes()):
        raise SystemExit(parser.get_error(0).desc())
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("input", *[(n, *x.shape[1:]) for n in (1, 8, 32)])
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit("it parses, and does not build")
    return np.empty(0)


RUNTIMES: dict[str, Callable[[Path, Any], Any]] = {
    function.__name__: function for function in (onnxruntime, openvino, openvino_single, ncnn, mnn, tract, tensorrt_rtx)
}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"


if __name__ == "__main__":
    runtime, file, inputs, outputs = sys.argv[1:]
    np.save(outputs, RUNTIMES[runtime](Path(file), np.load(inputs)))
