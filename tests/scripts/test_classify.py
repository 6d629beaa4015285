"""classify.py as a user runs it, on a machine without PyTorch: the probabilities, and one line for nonsense."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.export import digits
from tests.export.onnx_edits import change, setting
from tests.scripts.loading import load_script, refusal, run, run_here


@pytest.fixture
def bundle(bundles: Path) -> Path:
    return bundles / "fp32"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine digits as files: one more than a batch holds."""
    folder, data = tmp_path_factory.mktemp("pictures"), digits.held_out().pictures
    paths = [folder / f"{i}.png" for i in range(9)]
    for i, path in enumerate(paths):
        data.picture(i).save(path)
    return paths


def test_probabilities_without_pytorch(bundle: Path, pictures: list[Path], network: nn.Module, tmp_path: Path) -> None:
    process = run("classify", bundle, *pictures, "--json", cwd=tmp_path, **digits.without_torch(tmp_path / "hidden"))
    assert process.returncode == 0, process.stderr
    assert process.stderr.startswith(f"{bundle}/model.onnx on onnxruntime ") and process.stderr.count("\n") == 1
    records = json.loads(process.stdout)["images"]
    assert [record["path"] for record in records] == list(map(str, pictures))
    inputs = torch.from_numpy(digits.held_out_arrays()[0][:9])
    with torch.no_grad():
        logits, oracle = network(inputs).double(), copy.deepcopy(network).double()(inputs.double())
    # ONNX Runtime may do a few times over what float32 does to logits in PyTorch; p changes by as much, relatively.
    limit = 8 * max(float((logits - oracle).abs().max()), torch.finfo(torch.float32).eps * float(oracle.abs().max()))
    for record, row in zip(records, oracle.softmax(1), strict=True):
        probabilities, order = row.sort(descending=True)
        assert record["runtime"].startswith("onnxruntime ")
        assert [found["class"] for found in record["predictions"]] == order[:5].tolist()
        assert [found["label"] for found in record["predictions"]] == [str(i) for i in order[:5].tolist()]
        found = [found["probability"] for found in record["predictions"]]
        np.testing.assert_allclose(found, probabilities[:5], rtol=2 * limit)


def test_a_table_for_each_picture(bundle: Path, pictures: list[Path]) -> None:
    lines = run_here("classify", bundle, *pictures[:2]).stdout.splitlines()
    assert len(lines) == 12 and lines[0].strip() == str(pictures[0]) and lines[6].strip() == str(pictures[1])
    assert " % " in lines[1] and "█" in lines[1]


def test_a_folder_is_its_pictures_in_the_order_of_their_names(
    bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    inside = [tmp_path / name for name in ("b/1.png", "b/2.PNG", "c.png", "b/.hidden.png", "a.txt")]
    (tmp_path / "b").mkdir()
    for index, path in enumerate(inside):
        path.write_bytes(pictures[index].read_bytes())
    process = run_here("classify", bundle, pictures[3], tmp_path, pictures[4], "--json")
    assert process.returncode == 0, process.stderr
    records, alone = (json.loads(text)["images"] for text in (process.stdout, run_here(
        "classify", bundle, pictures[3], *inside[:3], pictures[4], "--json").stdout))  # fmt: skip
    assert records == alone and [r["path"] for r in records[1:4]] == [*map(str, inside[:3])]


def test_softmax_in_float64() -> None:
    classify, eps = load_script("classify"), np.finfo(np.float64).eps
    (row,) = classify.softmax(np.array([[1000.0, 999.0, -1000.0]], np.float32))
    (first, p), (second, q), (third, r) = classify.most_probable(row)
    assert (first, second, third) == (0, 1, 2) and r == 0.0
    assert p == pytest.approx(1 / (1 + np.exp(-1.0)), rel=4 * eps) and p + q == pytest.approx(1.0, rel=4 * eps)
    assert len(classify.most_probable(np.zeros(9))) == 5 and len(classify.most_probable(np.zeros(2))) == 2


def test_without_names_a_class_has_its_number(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    nameless = digits.rewrite(bundle, tmp_path / "b", lambda manifest, files: manifest["model"].pop("classes"))
    (record,) = json.loads(run_here("classify", nameless, pictures[3], "--json").stdout)["images"]
    assert all(found["label"] == f"class {found['class']}" for found in record["predictions"])


def test_a_bundle_that_says_nothing_is_told(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    silent = digits.rewrite(bundle, tmp_path / "b", model(preprocessing=None))
    flags = ("--mean", 0.31, "--std", 0.4, "--resize", "16x16")
    told, own = (
        run_here("classify", at, *pictures, "--json", *also).stdout for at, also in ((silent, flags), (bundle, ()))
    )
    assert told == own != run_here("classify", silent, *pictures, "--json", "--preprocessing", "imagenet").stdout
    refused = refusal(run_here("classify", bundle, pictures[0], "--mean", 0.31))
    assert refused == "--mean: it says itself how its pictures are prepared, expected nothing of that"


def model(**facts: object) -> digits.Change:
    return lambda manifest, files: manifest["model"].update(facts)


NAN = digits.change_onnx(lambda network: change(network, "fc.bias", setting(0, lambda values: np.nan)))
OBLONG = {**digits.PREPROCESSING.to_json(), "size": [8, 16]}
# a change to a sound bundle, the exit code and what is said
REFUSED: dict[str, tuple[digits.Change, int, str]] = {
    "no preprocessing": (
        model(preprocessing=None),
        2,
        "its pictures are prepared: --preprocessing imagenet, or another",
    ),
    "no record": (model(preprocessing=[3]), 2, "takes inputs of shape [1, 16, 16]: expected those of pictures, and a"),
    "another preprocessing": (model(preprocessing={"size": 3}), 2, "expected the description of a preprocessing"),
    "pictures of another size": (model(preprocessing=OBLONG), 2, "[1, 16, 16]: its preprocessing makes [1, 8, 16]"),
    "too few names": (model(classes=["one", "two"]), 2, "expected the names of 10 classes, got 2"),
    "NaN": (NAN, 1, "0.png: model.onnx returns NaN or Inf for this picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bundle_that_is_no_classifier_of_pictures_is_refused(
    case: str, bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    edit, code, message = REFUSED[case]
    process = run_here("classify", digits.rewrite(bundle, tmp_path / "b", edit), pictures[0])
    assert process.returncode == code and process.stdout == ""
    assert message in (refusal(process) if code == 2 else process.stderr.splitlines()[-1])


def test_an_unreadable_picture_is_named(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    """It is only found out when it is its turn, after a whole batch."""
    path = tmp_path / "broken.png"
    path.write_bytes(pictures[0].read_bytes()[:60])
    process = run_here("classify", bundle, *pictures, path)
    assert process.returncode == 2 and process.stdout == ""
    assert f"classify.py: error: {path}: expected a picture" in process.stderr.splitlines()[-1]


def test_a_loop_over_pictures_in_memory_is_timed(bundle: Path, pictures: list[Path]) -> None:
    timed = json.loads(run_here("classify", bundle, *pictures[:2], "--json", "--repeat", "3").stdout)["loop"]
    assert timed["pictures"] == 6 and timed["ratio"] == timed["median_ms"] / timed["runtime_ms"] > 1
    last = run_here("classify", bundle, pictures[0], "--repeat", "1").stdout.splitlines()[-1]
    assert last.startswith("a picture of 1 takes ") and " ms of onnxruntime " in last
    refused = run_here("classify", bundle, pictures[0], "--repeat", "0")
    assert refused.returncode == 2 and "--repeat: expected a whole number of at least 1, got 0" in refused.stderr
    missing = run_here("classify", bundle, pictures[0], "--runtime", "tensorrt")
    assert (
        missing.returncode == 2 and "has nothing for tensorrt: expected one of onnxruntime, openvino" in missing.stderr
    )


def test_equal_probabilities_come_in_the_order_of_the_classes() -> None:
    most_probable = load_script("classify").most_probable
    for logits in (np.zeros(9), np.array([0.0, 2, 1, 1, 1, 1, 1, 2, -9]), np.arange(3.0)):
        order = np.argsort(-logits, kind="stable")[:5]
        assert [index for index, _ in most_probable(logits)] == order.tolist()
