"""Engines built where they run: verified before they are in place, a way back, and nothing left of what fails."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from export import ExportError
from export.base.batch import Arrays, Inputs
from export.runtime import build as build_module
from export.runtime.artefacts import artefacts
from export.runtime.build import DeviceBuild, build_on_device
from export.runtime.bundle.contents import open_bundle
from export.runtime.bundle.folder import MANIFEST, publish, read_verified, staged
from export.runtime.engine_store import engine_place
from export.runtime.engines.engine import FLAVOURS, Engine, Flavour
from export.runtime.engines.options import DEFAULT_ENGINE, EngineConfig
from export.runtime.engines.runner import TensorRTRunner
from export.runtime.onnx_session import ONNX_FILE
from export.runtime.runner import Interface
from export.runtime.verify import verify_bundle
from tests.export import digits, summing
from tests.export.runtime.engines import fake_tensorrt

pytestmark = pytest.mark.usefixtures("captured_once")

ENGINE, LAYERS = "model.trt.engine", "model.trt.layers.json"
BEFORE = {f"previous.{name}" for name in (ENGINE, LAYERS)}


class Builder:
    """Stands in for `build_engine`: counts, and puts into its plans what the runner is to add to every sum."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.off: float | None = 0.0
        self.during: Callable[[], object] = lambda: None

    def __call__(self, onnx: bytes, flavour: Flavour, precision: Any, *facts: Any) -> Engine:
        self.asked.append((onnx, flavour.name, *facts))
        self.during()
        plan = json.dumps({"number": len(self.asked), "off": self.off}).encode()
        version, layers = fake_tensorrt.__version__, ({"onnx": hashlib.sha256(onnx).hexdigest()},)
        return Engine(flavour, plan, version, precision, 21, 1.234, facts[2], layers)


class Runner(TensorRTRunner):
    """Without a device and a process."""

    def __init__(self, engine: Engine, interface: Interface) -> None:
        super().__init__(engine, interface)
        self._off = json.loads(engine.plan)["off"]

    def __enter__(self) -> Runner:
        if self._off is None:
            raise ExportError("running the tensorrt engine was ended by SIGSEGV")
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def _run(self, inputs: Inputs) -> Arrays:
        return {"output": inputs["input"].sum((2, 3)) + np.float32(self._off)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "resnet-deploy" / "engines"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.FakeCuda:
    """A machine with a GPU and one TensorRT, which are stand-ins."""
    cuda = fake_tensorrt.FakeCuda()
    monkeypatch.setitem(FLAVOURS, "tensorrt", fake_tensorrt.FLAVOUR)
    monkeypatch.delitem(FLAVOURS, "tensorrt-rtx")
    for module in ("engines.cuda_runtime", "engine_store"):
        monkeypatch.setattr(f"export.runtime.{module}.import_cuda", lambda extra: cuda)
    return cuda


@pytest.fixture
def builder(gpu: fake_tensorrt.FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """What was asked of it; engines run in this process."""
    made = Builder()
    monkeypatch.setattr(build_module, "build_engine", made)
    monkeypatch.setattr("export.runtime.artefacts.TensorRTRunner", Runner)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle."""
    return summing.write(tmp_path / "b")


def build(path: Path, config: EngineConfig = DEFAULT_ENGINE) -> DeviceBuild:
    references, (found,) = build_on_device(path, config)
    assert [rung.name for rung in references] == ["eager"] and all(references)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def number(place: Path, name: str = ENGINE) -> int:
    """Which of the builder's engines a file is."""
    return int(json.loads(read_verified(place)[1][name])["number"])


def test_an_engine_is_built_verified_and_put_in_place(builder: Builder, cache: Path, path: Path) -> None:
    steps: list[str] = []
    _, (found,) = build_on_device(path, progress=steps.append)
    assert found and found.origin == "built" and found.rung.verdict == "equal" and found.rung.outputs
    place = found.file.parent
    assert steps == ["check the files", "build the tensorrt engine", f"run {found.file}", f"put it in {place}"]
    assert place.parent == cache and place.name.startswith("b-tensorrt-") and [*cache.iterdir()] == [place]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    batch, inputs = open_bundle(path).batch, {"input": (3, 4, 4)}
    assert builder.asked == [(summing.network("first"), "tensorrt", batch, inputs, DEFAULT_ENGINE, frozenset())]
    manifest, files = read_verified(place)
    assert files.keys() == {ENGINE, LAYERS} and found.size == len(files[ENGINE]) == found.file.stat().st_size
    assert json.loads(files[LAYERS]) == [{"onnx": open_bundle(path).onnx_sha256}]
    (record,) = manifest["engines"]
    assert (record["convolutions"], record["build_seconds"]) == (21, 1.23)
    assert record["key"] == {
        "onnx_sha256": open_bundle(path).onnx_sha256,
        "precision": "fp16",
        "batch": "1:4:8",
        "flavour": "tensorrt",
        "version": "10.3.0",
        "gpu": "Orin, compute capability 8.7, 16 multiprocessors, driver for CUDA 12.6",
        "options": {},
    }


def test_the_same_again_is_only_verified(builder: Builder, cache: Path, path: Path, tmp_path: Path) -> None:
    build(path)
    before = tree(cache)
    (tmp_path / "link").symlink_to(path)
    with staged(engine_place(path, FLAVOURS["tensorrt"])):  # another process may be building: nothing is written here
        found = build(tmp_path / "link")
    assert found and found.origin == "kept" and found.rung.outputs and len(builder.asked) == 1
    assert tree(cache) == before


def test_the_bundle_lists_it_first_and_verifies_it(builder: Builder, path: Path) -> None:
    file = build(path).file
    first = artefacts(open_bundle(path))[0]
    assert (first.form, first.file, first.obstacle) == ("tensorrt, built here", str(file), "")
    assert first.runtime == "tensorrt 10.3.0"
    rung = next(rung for rung in verify_bundle(path) if rung.file == str(file))
    assert rung and rung.outputs
    summing.write(path, "second")
    first, onnx = artefacts(open_bundle(path))
    assert (first.file, onnx.file) == (str(file), ONNX_FILE)
    assert first.obstacle == f"built from another model.onnx; build it again: build_on_device({str(path)!r})"
    assert next(rung for rung in verify_bundle(path) if rung.file == str(file)).not_run == first.obstacle


def test_it_comes_before_the_engine_of_the_bundle(builder: Builder, path: Path, tmp_path: Path) -> None:
    path = digits.rewrite(path, tmp_path / "with engine", digits.add_engine(ENGINE, "tensorrt", "10.3.0"))
    file = str(build(path).file)
    assert [artefact.file for artefact in artefacts(open_bundle(path))] == [file, ENGINE, ONNX_FILE]


def test_the_way_back_is_without_a_build(builder: Builder, path: Path) -> None:
    place = build(path).file.parent
    summing.write(path, "second")
    assert build(path).origin == "built"
    assert (number(place), number(place, f"previous.{ENGINE}")) == (2, 1)
    summing.write(path)
    assert artefacts(open_bundle(path))[0].obstacle.startswith("built from another model.onnx")
    found = build(path)
    assert found and found.origin == "restored" and found.rung.outputs and len(builder.asked) == 2
    assert (number(place), number(place, f"previous.{ENGINE}")) == (1, 2)
    assert json.loads((place / LAYERS).read_text()) == [{"onnx": open_bundle(path).onnx_sha256}]
    summing.write(path, "third")
    build(path)
    assert (number(place), number(place, f"previous.{ENGINE}")) == (3, 1) and len(tree(place)) == 5


def test_an_engine_that_is_wrong_by_now_is_built_anew_on_the_way_back(
    builder: Builder, place: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summing.write(path)

    class FirstWrong(Runner):
        def __init__(self, engine: Engine, interface: Interface) -> None:
            super().__init__(engine, interface)
            self._off = 0.5 if json.loads(engine.plan)["number"] == 1 else 0.0

    monkeypatch.setattr("export.runtime.artefacts.TensorRTRunner", FirstWrong)
    found = build(path)
    assert found and found.origin == "built" and len(builder.asked) == 3
    assert (number(place), number(place, f"previous.{ENGINE}")) == (3, 2)


OTHERS: dict[str, Callable[[fake_tensorrt.FakeCuda, pytest.MonkeyPatch], object]] = {
    "TensorRT": lambda cuda, patch: patch.setattr(fake_tensorrt, "__version__", "10.16.1"),
    "GPU": lambda cuda, patch: setattr(cuda.properties, "name", b"Thor"),
    "compute capability": lambda cuda, patch: setattr(cuda.properties, "major", 11),
    "multiprocessors": lambda cuda, patch: setattr(cuda.properties, "multiProcessorCount", 8),
    "driver": lambda cuda, patch: setattr(cuda, "driver", 13020),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_machine_is_another_engine(
    case: str, builder: Builder, gpu: fake_tensorrt.FakeCuda, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = build(path).file
    OTHERS[case](gpu, monkeypatch)
    obstacle = artefacts(open_bundle(path))[0].obstacle
    assert obstacle.startswith(
        "built by tensorrt 10.3.0 for Orin, compute capability 8.7, 16 multiprocessors, driver for CUDA 12.6; "
        "here is tensorrt "
    )
    assert obstacle.endswith(f"; build it again: build_on_device({str(path)!r})")
    assert build(path).origin == "built" and number(file.parent) == 2
    assert not artefacts(open_bundle(path))[0].obstacle


def test_an_engine_whose_machine_lost_its_gpu_says_so(
    builder: Builder, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(path)
    monkeypatch.setattr("export.runtime.engine_store.why_no_gpu", lambda extra: "no NVIDIA GPU here")
    assert artefacts(open_bundle(path))[0].obstacle.startswith("no NVIDIA GPU here")


def test_other_options_are_another_engine(builder: Builder, path: Path) -> None:
    build(path)
    small = EngineConfig(workspace_mib=64)
    assert build(path, small).origin == "built" and builder.asked[-1][4] == small
    engine = artefacts(open_bundle(path))[0].engine
    assert engine is not None and engine.config == small
    assert build(path).origin == "restored"


@pytest.mark.parametrize("off", [0.5, float("nan"), None], ids=["wrong", "NaN", "crash"])
@pytest.mark.parametrize("existing", [True, False], ids=["over an engine", "into nothing"])
def test_an_engine_that_fails_is_not_put_in_place(
    off: float | None, existing: bool, builder: Builder, cache: Path, path: Path
) -> None:
    if existing:
        build(path)
    before = tree(cache)
    summing.write(path, "second")
    builder.off = off
    found = build(path)
    assert not found and found.origin == "built" and found.rung.verdict not in ("", "equal")
    assert tree(cache) == before and len([*cache.iterdir()]) == existing


def test_an_engine_in_place_that_fails_is_refused_and_stays(builder: Builder, cache: Path, path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    build(path)
    before = tree(cache)
    monkeypatch.setattr(Runner, "_run", lambda self, inputs: {"output": inputs["input"].mean((2, 3))})
    found = build(path)
    assert not found and found.origin == "kept" and tree(cache) == before


def test_a_build_that_dies_leaves_nothing(builder: Builder, cache: Path, path: Path) -> None:
    builder.during = Mock(side_effect=ExportError("building the engine was ended by SIGKILL"))
    with pytest.raises(ExportError, match="ended by SIGKILL"):
        build(path)
    assert not [*cache.iterdir()]


def test_the_second_of_two_builds_says_so(builder: Builder, path: Path) -> None:
    def again() -> None:
        with pytest.raises(ExportError, match=r"is writing to .*/b-tensorrt-"):
            build(path)

    builder.during = again
    assert build(path) and len(builder.asked) == 1


def test_a_build_that_another_one_overtook_is_not_repeated(
    builder: Builder, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock, another process builds the same."""
    place = build(path).file.parent
    summing.write(path, "second")
    real = build_module.staged

    def late(output: Path) -> Any:
        monkeypatch.setattr(build_module, "staged", real)
        assert build(path).origin == "built"
        return real(output)

    monkeypatch.setattr(build_module, "staged", late)
    assert build(path).origin == "kept" and len(builder.asked) == 2
    assert (number(place), number(place, f"previous.{ENGINE}")) == (2, 1)


RTX = Flavour("tensorrt-rtx", fake_tensorrt.__name__, "model.rtx.engine", "model.rtx.layers.json", False, False)


def test_a_flavour_that_does_not_serve_the_gpu_is_not_built(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FLAVOURS, "tensorrt-rtx", RTX)
    _, builds = build_on_device(summing.write(tmp_path / "b"))
    assert [asked[1] for asked in builder.asked] == ["tensorrt"] and len(builds) == 1
    monkeypatch.delitem(FLAVOURS, "tensorrt")
    with pytest.raises(ExportError, match="no tensorrt-rtx engine: tensorrt-rtx does not serve the GPU here: Orin, "):
        build_on_device(tmp_path / "b")


def test_both_flavours_are_built_each_in_its_place(
    builder: Builder, gpu: fake_tensorrt.FakeCuda, cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FLAVOURS, "tensorrt-rtx", RTX)
    gpu.properties.minor = 6
    _, builds = build_on_device(path)
    assert all(builds) and [asked[1] for asked in builder.asked] == ["tensorrt", "tensorrt-rtx"]
    assert [found.file.name for found in builds] == [ENGINE, "model.rtx.engine"] and len([*cache.iterdir()]) == 2
    assert [artefact.file for artefact in artefacts(open_bundle(path))][:2] == [str(found.file) for found in builds]


def test_bundles_of_one_name_have_places_of_their_own(builder: Builder, tmp_path: Path) -> None:
    long = "\N{GRINNING FACE}" * 60
    paths = [summing.write(tmp_path / folder / long) for folder in ("one", "two")]
    places = [build(path).file.parent for path in paths]
    assert places[0] != places[1] and [number(place) for place in places] == [1, 2]


def test_layers_kept_in_a_wider_type_are_those_of_the_manifest(builder: Builder, tmp_path: Path) -> None:
    for precision in ("fp16", "int8"):
        build_on_device(summing.write(tmp_path / precision, precision=precision, kept=["conv1", "fc"]))
        assert builder.asked[-1][5] == {"conv1", "fc"}


def test_a_changed_bundle_is_refused_before_anything_is_built(builder: Builder, cache: Path, path: Path) -> None:
    (path / ONNX_FILE).write_bytes(summing.network("other"))
    with pytest.raises(ExportError, match=f"{ONNX_FILE}: changed since it was written"):
        build(path)
    assert not builder.asked and not cache.exists()


def test_without_gpu_or_package_nothing_is_left(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.runtime.engine_store.why_no_gpu", lambda extra: f"no NVIDIA GPU here ({extra})")
    absent = Flavour("tensorrt", "no_such_module", "x.engine", "x.json", True, True)
    monkeypatch.setitem(FLAVOURS, "tensorrt", absent)
    with pytest.raises(ExportError) as error:
        build_on_device(summing.write(tmp_path / "b"))
    assert str(error.value) == (
        "no tensorrt engine: no_such_module is not installed; install it with: pip install -e '.[tensorrt]'; "
        "no tensorrt-rtx engine: no NVIDIA GPU here (tensorrt-rtx)"
    )
    assert not cache.exists()


@pytest.fixture
def place(builder: Builder, path: Path) -> Path:
    """Of the bundle, with an engine and the one before it."""
    build(path)
    summing.write(path, "second")
    return build(path).file.parent


@pytest.mark.parametrize("name", [ENGINE, LAYERS, MANIFEST, *sorted(BEFORE)])
def test_a_changed_place_is_refused_before_anything_is_loaded(
    name: str, place: Path, builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("loaded before it was checked")

    content = (place / name).read_bytes()
    (place / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    monkeypatch.setattr("export.runtime.artefacts.TensorRTRunner", loaded)
    message = rf"{name}: changed since it was written.*; remove {place} and build the engine again$"
    with pytest.raises(ExportError, match=message):
        artefacts(open_bundle(tmp_path / "b"))
    with pytest.raises(ExportError, match=message):
        build(tmp_path / "b")
    assert len(builder.asked) == 2


def test_a_place_open_to_others_or_with_more_in_it_is_refused(place: Path, tmp_path: Path) -> None:
    place.parent.chmod(0o750)
    for refused in (lambda: artefacts(open_bundle(tmp_path / "b")), lambda: build(tmp_path / "b")):
        with pytest.raises(ExportError, match=r"engines is not private to this user \(expected mode 0700\)"):
            refused()
    place.parent.chmod(0o700)
    (place / "libevil.so").touch()
    with pytest.raises(ExportError, match=r"libevil\.so: not listed in manifest\.json; remove "):
        build(tmp_path / "b")


FOREIGN: dict[str, dict[str, Any]] = {
    "engines of another form": {"engines": {ENGINE: {}}},
    "an unknown flavour": {"engines": [{"key": {"flavour": "openvino", "options": {}}}]},
    "unknown options": {"engines": [{"key": {"flavour": "tensorrt", "options": {"speed": 11}}}]},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_place_of_something_else_is_refused(case: str, place: Path, tmp_path: Path) -> None:
    with staged(place) as staging:
        publish(staging, place, {ENGINE: b"", LAYERS: b"[]"}, FOREIGN[case])
    with pytest.raises(ExportError, match=rf"^{place}: not an engine of this project .*; remove it and build"):
        artefacts(open_bundle(tmp_path / "b"))


def test_a_user_without_a_home_has_built_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which does not count
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with pytest.raises(RuntimeError):
        engine_place(tmp_path / "b", FLAVOURS["tensorrt"])
    assert [artefact.file for artefact in artefacts(open_bundle(summing.write(tmp_path / "b")))] == [ONNX_FILE]
