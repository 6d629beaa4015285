"""Bundles with one file damaged and every hash made to fit again, as somebody who means harm would."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from export.base.errors import ExportError
from export.runtime.artefacts import artefacts
from export.runtime.bundle.contents import open_bundle
from export.runtime.bundle.folder import MANIFEST
from export.runtime.bundle.golden import GOLDEN_FILE
from export.runtime.onnx_session import ONNX_FILE, open_file
from export.runtime.parity.accuracy import class_indices
from export.runtime.verify import verify_bundle
from resnet.data.preprocessing import Preprocessing
from resnet.errors import ResNetError
from tests.faults.mutations import damaged_bytes, damaged_json, damaged_onnx, damaged_safetensors, deep_recursion
from tests.scripts.loading import load_script

LARGEST = 32 << 20  # bytes of a manifest: the file that holds it is limited too
TryOne = Callable[[int], str]
ENGINE = "model.rtx.engine"
READ = ("format", "model", "precision", "batch", "inputs", "outputs", "engines", "files")  # parts of a manifest


def manifests(source: Path, folder: Path) -> TryOne:
    """Those that are read go through a script, too. The bundle says that it holds an engine."""
    bundle = with_engine(source, folder, "0.0.0.1")
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    commands = {
        load_script("verify"): [str(bundle)],
        load_script("classify"): [str(bundle), str(a_picture(folder / "picture.png"))],
        load_script("evaluate"): [str(bundle), str(class_folders(folder / "data"))],
    }

    def try_one(index: int) -> str:
        generator = random.Random(f"manifest {index}")
        if generator.random() < 0.2:
            damaged = damaged_json(generator, manifest)
        else:
            part = generator.choice(READ)
            damaged = {**manifest, part: damaged_json(generator, manifest[part])}
        text = canonical(with_own_hash(damaged))
        kind = generator.random()
        if kind < 0.1:
            text = damaged_bytes(generator, text)
        elif kind < 0.15:
            text = text.replace(b"{\n", b'{\n  "format": 2,\n', 1)
        (bundle / MANIFEST).write_bytes(text[:LARGEST])
        word = refused_or(lambda: read(bundle))
        if word != "refused" or index % 20 == 0:
            module, arguments = generator.choice(list(commands.items()))
            run(module, arguments)
        return word

    return try_one


def golden_files(source: Path, folder: Path) -> TryOne:
    bundle = copied(source, folder)
    content = (source / GOLDEN_FILE).read_bytes()

    def try_one(index: int) -> str:
        replace(bundle, GOLDEN_FILE, damaged_safetensors(random.Random(f"golden {index}"), content))
        return refused_or(lambda: all(verify_bundle(bundle)))

    return try_one


def onnx_files(source: Path, folder: Path) -> TryOne:
    """Two of three as verify runs them, the others as a file of 16 bits is run."""
    bundle = copied(source, folder)
    content = (source / ONNX_FILE).read_bytes()

    def try_one(index: int) -> str:
        damaged = damaged_onnx(random.Random(f"onnx {index}"), content)
        if index % 3 == 0:
            return refused_or(lambda: open_file(damaged, rounded=True) is not None)
        replace(bundle, ONNX_FILE, damaged)
        return refused_or(lambda: all(verify_bundle(bundle)))

    return try_one


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "bundle"))


def with_own_hash(manifest: Any) -> Any:
    if not isinstance(manifest, dict):
        return manifest
    return {**manifest, "manifest_sha256": hashlib.sha256(canonical(manifest)).hexdigest()}


def canonical(value: Any) -> bytes:
    """As `export.runtime.bundle.folder` writes a manifest."""
    with deep_recursion():
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def forge(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a bundle, which stays whole."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    change(manifest)
    (bundle / MANIFEST).write_bytes(canonical(with_own_hash(manifest)))


def replace(bundle: Path, name: str, content: bytes) -> None:
    """Another content for a file of a bundle, which stays whole."""
    (bundle / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forge(bundle, lambda manifest: manifest["files"].update({name: entry}))


def with_engine(source: Path, folder: Path, version: str, gpu: str | None = None) -> Path:
    """A copy with an engine that says it was built by that version of TensorRT-RTX, and on that GPU."""
    bundle = copied(source, folder)
    replace(bundle, ENGINE, b"a plan that no version of TensorRT wrote")
    facts = {"flavour": "tensorrt-rtx", "version": version, "convolutions": 9, "build_seconds": 1.0, "gpu": gpu}
    options = {"version_compatible": True, "targets": ["sm_86"]}
    forge(bundle, lambda manifest: manifest.update(engines={ENGINE: {**facts, "options": options}}))
    return bundle


def refused_or(function: Callable[[], object]) -> str:
    """`refused` for a refusal of one line, else what the result is worth."""
    try:
        return "passed" if function() else "failed"
    except (ExportError, ResNetError) as error:
        lines = str(error).splitlines()
        if len(lines) != 1:
            raise AssertionError(f"expected one line, got {len(lines)}: {str(error)[:100]}") from error
        return "refused"


def read(path: Path) -> bool:
    """What the scripts read from a manifest before anything runs."""
    bundle = open_bundle(path)
    artefacts(bundle)
    preprocessing = Preprocessing.from_json(bundle.preprocessing)
    bundle.check_input((preprocessing.channels, *preprocessing.size))
    class_indices(("class 0", "class 1"), bundle.classes, bundle.class_count)
    return True


def run(module: ModuleType, arguments: list[str]) -> str:
    """The exit code of a script as a word; AssertionError for an unknown one, and for 2 without one line that says why.

    The streams refuse and escape what those of a terminal do.
    """
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = module.main(arguments)
        except SystemExit as end:
            code = end.code
    err.seek(0)
    said = [line for line in err.read().splitlines() if " s  " not in line]  # progress lines apart
    assert code in (0, 1, 2), f"exit code {code!r}"
    assert not any("Traceback" in line for line in said), f"{said}"
    refusals = [line for line in said if ".py: error: " in line]
    assert refusals == (said[-1:] if code == 2 else []), f"exit code {code} and {said}"
    return f"exit code {code}"


def a_picture(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def class_folders(root: Path) -> Path:
    for index in range(2):
        (root / f"class {index}").mkdir(parents=True)
        a_picture(root / f"class {index}" / "picture.png", index)
    return root
