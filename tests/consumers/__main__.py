"""`python -m tests.consumers`: our files in the runtimes of others, as a table in docs/consumers.md.

Outside CI: it installs what it needs from PyPI and npm into a temporary folder, a few hundred MB in all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.base.machine import describe_machine
from export.runtime.bundle.contents import Bundle, open_bundle
from export.runtime.onnx_session import CPU_ONNX_FILE, ONNX_FILE
from export.runtime.parity.network import NetworkCheck, compare
from export.runtime.verify import golden_references

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "consumers.md"
WEIGHTS = ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors"
COLUMNS = {
    "fp32": ("fp32", ONNX_FILE),
    "fp16": ("fp16", ONNX_FILE),
    "bf16": ("bf16", ONNX_FILE),
    "int8, `model.onnx`": ("int8", ONNX_FILE),
    "int8, `model.cpu.onnx`": ("int8", CPU_ONNX_FILE),
}
SECONDS = 300  # for one file


@dataclass(frozen=True)
class Consumer:
    """A runtime of others.

    Attributes:
        name: in the table.
        runtime: of `running.py`, or the npm package that `running.mjs` runs.
        packages: what pip or npm installs; the first one's version is in the table.
        take: which file to give it, and how.
        alone: what pip installs without what that asks for.
    """

    name: str
    runtime: str
    packages: tuple[str, ...]
    take: str
    alone: tuple[str, ...] = ()

    @property
    def npm(self) -> bool:
        return self.runtime.startswith("onnxruntime-")


CONSUMERS = (
    Consumer(
        "ONNX Runtime, oldest",
        "onnxruntime",
        ("onnxruntime==1.23.2",),
        "the last for Python 3.10 (JetPack 6): fp32, fp16; of int8 `model.cpu.onnx`, never `model.onnx`: before 1.30 "
        "QuantizeLinear cuts off float16 where it has to round",
    ),
    Consumer(
        "ONNX Runtime",
        "onnxruntime",
        ("onnxruntime",),
        "fp32, fp16; of int8 `model.cpu.onnx`. Its CPU has no bfloat16: `verify` runs such a file rounded, in float32",
    ),
    Consumer(
        "OpenVINO, as it comes",
        "openvino",
        ("openvino",),
        "not like this where the CPU has bfloat16, in which it then computes whatever the file says: see the next row",
    ),
    Consumer(
        "OpenVINO, told `f32`",
        "openvino_single",
        ("openvino",),
        "any, with `INFERENCE_PRECISION_HINT` `f32`, as `--runtime openvino` sets it",
    ),
    Consumer("onnxruntime-node", "onnxruntime-node", ("onnxruntime-node",), "fp32, fp16; of int8 `model.cpu.onnx`"),
    Consumer(
        "onnxruntime-web, WebAssembly",
        "onnxruntime-web",
        ("onnxruntime-web",),
        "fp32, fp16; of int8 `model.cpu.onnx`",
    ),
    Consumer(
        "ncnn, through pnnx",
        "ncnn",
        ("ncnn",),
        "fp32: it has neither the Cast that a 16-bit file ends in nor what pnnx makes of 8 bits",
        ("pnnx",),  # whose program is its own; it asks for PyTorch with all of CUDA
    ),
    Consumer("MNN", "mnn", ("MNN",), "fp32, fp16"),
    Consumer(
        "tract", "tract", ("tract",), "fp32; of int8 `model.cpu.onnx`. fp16 runs, with twice the error it should have"
    ),
    Consumer(
        "TensorRT-RTX's parser and builder",
        "tensorrt_rtx",
        ("tensorrt-rtx==1.7.1.116",),
        "any but `model.cpu.onnx`; built, not run, for want of a GPU",
    ),
)


def main() -> int:
    """Export, install, run and write the page; 1 where the fp32 file fails anywhere it should run."""
    found: dict[str, dict[str, str]] = {}
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = {precision: exported(precision, Path(folder)) for precision in ("fp32", "fp16", "bf16", "int8")}
        for number, consumer in enumerate(CONSUMERS):
            home = Path(folder) / f"consumer{number}"
            print(f"install {consumer.name}", flush=True)
            version, command = installed(consumer, home)
            row = {"version": version}
            for column, (precision, file) in COLUMNS.items():
                row[column], message = outcome(bundles[precision], file, command, home)
                print(f"  {column}: {message or row[column]}", flush=True)
                if message:
                    said.append(f"{consumer.name} {version}, {column}: {message}")
            found[consumer.name] = row
    PAGE.write_text(page(found, said))
    print(f"{PAGE.relative_to(ROOT)} written")
    bad = [name for name, row in found.items() if row["fp32"].startswith(("refuses", "**")) and "comes" not in name]
    if bad:
        print(f"the fp32 file does not run in {', '.join(bad)}")
    return 1 if bad else 0


def exported(precision: str, folder: Path) -> Bundle:
    path = folder / precision
    command = [*("scripts/export.py", "--weights", WEIGHTS, f"--{precision}", "--engine", "none"), "--output", path]
    run([sys.executable, *command], cwd=ROOT)
    return open_bundle(path)


def installed(consumer: Consumer, home: Path) -> tuple[str, list[str]]:
    """Its version, and the command that runs a file in it."""
    home.mkdir()
    package = re.split("[=<>]", consumer.packages[0])[0]
    if consumer.npm:
        (home / "package.json").write_text("{}")
        # Without its script, which downloads a GPU's half from elsewhere.
        run(["npm", "install", "--silent", "--ignore-scripts", *consumer.packages], cwd=home)
        about = json.loads((home / "node_modules" / package / "package.json").read_text())
        return about["version"], ["node", str(HERE / "running.mjs"), consumer.runtime]
    run([sys.executable, "-m", "venv", home / "venv"])
    python = str(home / "venv" / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", "numpy", *consumer.packages])
    if consumer.alone:
        run([python, "-m", "pip", "install", "--quiet", "--no-deps", *consumer.alone])
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return run([python, "-c", code]).strip(), [python, str(HERE / "running.py"), consumer.runtime]


def outcome(bundle: Bundle, file: str, command: Sequence[str], home: Path) -> tuple[str, str]:
    """What the table says of a file, and what the runtime does where it does not run."""
    references = golden_references(bundle)
    (x,) = references.inputs.values()
    inputs, outputs = home / "x.npy", home / "y.npy"
    read: Callable[[], NDArray] = lambda: np.load(outputs)  # noqa: E731
    if command[0] == "node":
        inputs, outputs = home / "x.bin", home / "y.bin"
        x.tofile(inputs)
        read = lambda: np.fromfile(outputs, np.float32).reshape(len(x), -1)  # noqa: E731
    else:
        np.save(inputs, x)
    outputs.unlink(missing_ok=True)
    full = [*command, str(bundle.path / file), str(inputs), str(outputs)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(full, cwd=home, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "refuses", f"no end within {SECONDS} s"
    if done.returncode or not outputs.exists():
        return "refuses", reason(done.stderr, done.returncode)
    y = read()
    if not y.size:
        return "builds", ""
    precision = bundle.precision
    outs = dict(zip(bundle.outputs, [y], strict=True))
    factor, floor = precision.network_factor, precision.network_floor
    (check,) = compare(
        outs, list(references.rounded.values()), references.oracle, factor, floor, references.kinds
    ).values()
    return described(check)


def described(check: NetworkCheck) -> tuple[str, str]:
    if check:
        return f"agrees ({check.ratio:.2f})", ""
    return f"**differs ({check.ratio:.2g})**", f"it runs, and its {check.reason}"


def reason(text: str, code: int) -> str:
    """The line that says what is wrong, out of a traceback or a log."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"\d+: |at |File |Stack|note:", line)]
    telling = [line for line in lines if re.search(r"[Ee]rror|[Uu]nif|Unknown|NOT_IMPL|could not|mismatch", line)]
    line = (telling or lines or [f"it ends with {code}"])[-1]
    return re.sub(r"/tmp/\S*/", "", line)[:240]


def run(command: Sequence[object], cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout)[-1000:]}")
    return done.stdout


def page(found: Mapping[str, Mapping[str, str]], said: Sequence[str]) -> str:
    """docs/consumers.md."""
    machine = describe_machine(None)
    head = ["runtime", "version", *COLUMNS]
    rows = [[name, row["version"], *(row[column] for column in COLUMNS)] for name, row in found.items()]
    table = [head, ["---"] * len(head), *rows]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    takes = [f"| {consumer.name} | {consumer.take} |" for consumer in CONSUMERS]
    return "\n".join(
        [
            "# Our files in the runtimes of others",
            "",
            "`make test-consumers` installs each of these from PyPI or npm, runs the files of the shipped resnet20 on",
            "its 16 golden inputs and writes this page. `agrees` is what `verify` calls equal; in brackets the error",
            "against the float64 model over that of unfused operators in the same precision.",
            f"On {machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}.",
            "",
            *lines,
            "",
            "## Which file for which runtime",
            "",
            "| runtime | take |",
            "|---|---|",
            *takes,
            "",
            "On a CPU an fp16 file halves the disk alone: a runtime without float16 arithmetic widens its weights when",
            "it loads them, and takes the memory and the time of the fp32 file, or more.",
            "",
            "## What they say",
            "",
            *(f"* {line}" for line in said),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
