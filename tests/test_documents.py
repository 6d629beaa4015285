"""README and docs/ as they stand there: every snippet is run here, or says what it needs; every command line parses.

The first line of a snippet names its language and, where it is not run, what that takes: ```sh needs: a Jetson. Blocks
of `text` and `console` are what somebody saw; of the latter the commands, behind `$`, are parsed too.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from torch import Tensor, nn

from export.sample_inputs import crops, photographs
from tests.children import run
from tests.conftest import IMAGE_SIZES
from tests.cuda_stand_in.building import needed
from tests.export import digits
from tests.scripts.loading import load_script, run_here

pytestmark = pytest.mark.usefixtures("captured_once")

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
RUN, SEEN = ("python", "cpp", "sh"), ("text", "console", "cmake")
COMMAND = re.compile(
    r"^(?:\$ )?(?:\.venv/bin/)?(?:python scripts/(\w+)\.py|resnet-deploy (\w[\w-]*))\b(.*)$", re.MULTILINE
)


@dataclass(frozen=True)
class Snippet:
    """A fenced block.

    Attributes:
        place: file and line.
        needs: what it takes to run it; empty where it is run here.
    """

    place: str
    language: str
    needs: str
    text: str


def snippets() -> list[Snippet]:
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        content = path.read_text()
        for fence in FENCE.finditer(content):
            language, _, needs = fence[1].partition(" needs: ")
            line = content.count("\n", 0, fence.start()) + 1
            found.append(Snippet(f"{path.relative_to(ROOT)}:{line}", language.strip(), needs.strip(), fence[2]))
    return found


ALL = snippets()
HERE = {language: [s for s in ALL if s.language == language and not s.needs] for language in RUN}


def test_every_snippet_is_run_or_says_what_it_needs() -> None:
    assert len(ALL) > 40 and all(len(HERE[language]) > 1 for language in RUN)
    unknown = [snippet.place for snippet in ALL if snippet.language not in (*RUN, *SEEN)]
    assert not unknown, f"neither run nor marked: {', '.join(unknown)}"


def test_the_reader_of_fences_sees_all_of_them() -> None:
    fences = [
        line
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for line in path.read_text().splitlines()
        if line.lstrip().startswith("```")
    ]
    assert len(fences) == 2 * len(ALL)


def test_the_wheel_is_named_as_it_is_built() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {found for snippet in ALL for found in re.findall(r"resnet_deploy-(.*?)-py3-none-any\.whl", snippet.text)}
    assert named == {version}


@pytest.mark.parametrize("snippet", [s for s in ALL if s.language in ("sh", "console")], ids=lambda s: s.place)
def test_the_commands_parse(snippet: Snippet) -> None:
    for script, command, arguments in COMMAND.findall(snippet.text.replace("\\\n", " ")):
        name = script or {"compile": "compile_kernels"}.get(command, command.replace("-", "_"))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                load_script(name).parse_args(shlex.split(arguments, comments=True))
            except SystemExit as stopped:
                assert not stopped.code, f"{snippet.place}: {script}{command}{arguments}: {said.getvalue()}"


@pytest.fixture(scope="module")
def bundle(trained_digits: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.write(digits.fused(trained_digits[0]), tmp_path_factory.mktemp("bundle") / "fp16", "fp16")


@pytest.fixture
def place(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where snippets run: with a bundle of the digits' network and a picture."""
    shutil.copytree(bundle, tmp_path / "build" / "resnet20-fp16")
    digits.held_out().pictures.picture(3).resize((40, 60)).save(tmp_path / "digit.png")
    (tmp_path / "resnet").symlink_to(ROOT / "resnet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = {"docs/features.md": "basic"}  # whose stages are as wide as a ResNet-18's


@pytest.mark.parametrize("snippet", HERE["python"], ids=lambda s: s.place)
def test_python_runs(snippet: Snippet, calibrated: dict[str, nn.Module], place: Path) -> None:
    name = GIVEN.get(snippet.place.partition(":")[0], "resnet20")
    images = crops(photographs(), 8, 3, (IMAGE_SIZES[name],) * 2)
    names: dict[str, Any] = {"model": calibrated[name], "example": images[:1], "images": images}
    exec(compile(snippet.text, snippet.place, "exec"), names)
    for made in re.findall(r'export_bundle\(.*"(build/\w+)"', snippet.text):
        assert (place / made / "manifest.json").is_file()
    if "probabilities" in names:
        right = probabilities()
        np.testing.assert_allclose(np.ravel(names["probabilities"])[right > 0], right[right > 0], rtol=1e-5)


def probabilities() -> NDArray:
    """Of the picture, as classify.py finds them."""
    (record,) = json.loads(run_here("classify", "build/resnet20-fp16", "digit.png", "--json").stdout)["images"]
    found = {entry["class"]: entry["probability"] for entry in record["predictions"]}
    return np.array([found.get(index, 0) for index in range(10)])


@pytest.mark.parametrize("snippet", HERE["sh"], ids=lambda s: s.place)
def test_commands_run(snippet: Snippet, place: Path) -> None:
    for script, command, arguments in COMMAND.findall(snippet.text):
        done = run_here(script or command, *shlex.split(arguments, comments=True))
        assert not done.returncode, done.stderr


@pytest.mark.parametrize("snippet", HERE["cpp"], ids=lambda s: s.place)
def test_cpp_compiles_and_with_onnx_runtime_runs(snippet: Snippet, place: Path) -> None:
    compiler, source = needed("g++"), place / "snippet.cpp"
    source.write_text(snippet.text)
    options = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-I", str(ROOT / "kernels" / "runtime"), str(source)]
    if "onnxruntime_cxx_api.h" not in snippet.text:
        done = run([*options, "-fsyntax-only"])
        assert not done.returncode, done.stderr
        return
    if run(
        [compiler, "-std=c++17", "-fsyntax-only", "-include", "onnxruntime_cxx_api.h", "-x", "c++", "/dev/null"]
    ).returncode:
        pytest.skip("needs the headers of ONNX Runtime's C++ API (CPLUS_INCLUDE_PATH)")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    (place / "libonnxruntime.so").symlink_to(library)
    (place / library.name.rpartition(".1.")[0]).with_name("libonnxruntime.so.1").symlink_to(library)
    done = run([*options, "-o", "classify", "-L.", "-lonnxruntime", f"-Wl,-rpath,{place}"])
    assert not done.returncode, done.stderr
    image, model = digits.held_out_arrays()[0][:1], "build/resnet20-fp16/model.onnx"
    image.tofile("image.f32")
    (scores,) = onnxruntime.InferenceSession(model).run(None, {"input": image})
    done = run(["./classify", model, "image.f32"])
    assert done.stdout == f"class {scores.argmax()}, score {scores.max():.6g}\n", done.stderr
