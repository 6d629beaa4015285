"""The example's scaling in C++ against Pillow's, to the last level and the last bit of an input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.golden_picture import golden_picture
from export.sample_inputs import photographs
from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tests.children import run
from tests.cuda_stand_in.building import has_json, needed
from tests.cuda_stand_in.stand_in import ROOT

RGB, GREY = (IMAGENET_MEAN, IMAGENET_STD), ((0.3055,), (0.3187,))
# pictures (width, height): shrinking, enlarging, both, odd, one pixel, long, untouched in one side, as it is
SHAPES = [(97, 61), (13, 17), (20, 90), (64, 48), (1, 1), (150, 3), (36, 80), (36, 36), (35, 37), (640, 427)]
WAYS = {
    "bilinear": Preprocessing((32, 32), (36, 36), *RGB),
    "bicubic": Preprocessing((32, 31), (36, 36), *RGB, "bicubic"),
    "squashed": Preprocessing((30, 36), (35, 36), *RGB, "bicubic", keep_aspect=False),
    "oblong grey": Preprocessing((21, 45), (30, 50), *GREY, keep_aspect=True),
    "bytes": Preprocessing((29, 33), (33, 40), *GREY, "bicubic", as_bytes=True),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "prepare"
    source = ROOT / "kernels" / "runtime" / "example" / "prepare.cpp"
    if not has_json(needed("g++")):
        pytest.skip("needs the header of nlohmann-json (Debian: nlohmann-json3-dev)")
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")
    done = run(["g++", *flags, source, "-o", path])
    assert not done.returncode, done.stderr[-3000:]
    return path


def prepared(program: Path, way: Preprocessing, picture: Image.Image, folder: Path) -> bytes:
    kind = "uint8" if way.as_bytes else "float32"
    manifest = {"model": {"preprocessing": way.to_json()}, "inputs": [{"dtype": kind}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    picture.convert("L" if way.channels == 1 else "RGB").save(folder / "picture.ppm")
    done = run([program, "manifest.json", "picture.ppm", "input"], cwd=folder)
    assert not done.returncode, done.stderr
    return (folder / "input").read_bytes()


@pytest.mark.parametrize("name", WAYS)
def test_as_pillow_scales(name: str, program: Path, tmp_path: Path) -> None:
    way, photograph = WAYS[name], photographs()[0]
    generator = np.random.default_rng(0)
    for width, height in SHAPES:
        hard = generator.integers(0, 2, (height, width, 3), np.uint8) * 255  # overshoots, and has no even neighbours
        for picture in (Image.fromarray(hard), photograph.resize((width, height))):
            assert prepared(program, way, picture, tmp_path) == way([picture]).tobytes(), (width, height)


@pytest.mark.parametrize("name", ["bilinear", "bytes"])
def test_the_golden_picture_becomes_its_input(name: str, program: Path, tmp_path: Path) -> None:
    """And sampling, in place of averaging, makes something else of it."""
    way = WAYS[name]
    files = golden_picture(way, np.zeros((1, *way.shape), np.uint8 if way.as_bytes else np.float32))
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    picture, expected = Image.open(tmp_path / "golden-picture.png"), np.load(tmp_path / "golden-picture.npy")
    assert prepared(program, way, picture, tmp_path) == expected.tobytes()
    sampled = replace(way, interpolation="nearest", as_bytes=True)([picture])
    assert np.abs(sampled.astype(int) - replace(way, as_bytes=True)([picture])).max() > 50


def test_what_it_does_not_do_is_refused(program: Path, tmp_path: Path) -> None:
    way = WAYS["bilinear"]
    for change, message in ((replace(way, interpolation="lanczos"), "expected bilinear or bicubic, got lanczos"),):
        with pytest.raises(AssertionError, match=message):
            prepared(program, change, Image.new("RGB", (9, 9)), tmp_path)
