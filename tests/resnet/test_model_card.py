"""Model cards: what is written into a safetensors file comes back, and what cannot be understood is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from resnet.data.preprocessing import Preprocessing
from resnet.model_card import ModelCard, read_model_card

RGB = Preprocessing((224, 224), (256, 256), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocessing((16, 20), (16, 20), (0.1 + 0.2,), (1 / 3,))
CARDS = {
    "measured": ModelCard("resnet20", GREY, ("a", "b"), "digits", 0.97 + 1e-12, 359),
    "not-measured": ModelCard("resnet50", RGB, tuple(f"class {i}" for i in range(1000)), "photographs"),
    "nothing-right": ModelCard("resnet18", RGB, ("a", "b"), "pets", 0.0, 10),
    "names-of-any-kind": ModelCard("resnet18", RGB, ('"quoted"', "ä \u732b", "", "two\nlines"), "Tiere 🐈", 1.0, 1),
}
TENSORS = {"fc.bias": torch.ones(2), "fc.weight": torch.ones(2, dtype=torch.bfloat16)}


def write(path: Path, metadata: dict[str, str] | None) -> Path:
    safetensors.torch.save_file(TENSORS, path, metadata=metadata)
    return path


@pytest.mark.parametrize("as_text", [False, True], ids=["path", "text"])
@pytest.mark.parametrize("case", CARDS)
def test_round_trip(case, as_text, tmp_path):
    path = write(tmp_path / "model.safetensors", {**CARDS[case].to_metadata(), "format": "pt"})
    assert read_model_card(str(path) if as_text else path) == CARDS[case]
    assert torch.equal(safetensors.torch.load_file(path)["fc.bias"], TENSORS["fc.bias"])


def test_equal_cards_are_written_alike():
    again = ModelCard("resnet20", GREY, ("a", "b"), "digits", 0.97 + 1e-12, 359)
    assert again.to_metadata() == CARDS["measured"].to_metadata()
    assert all(type(value) is str for value in again.to_metadata().values())


def pickled(folder: Path) -> Path:
    torch.save(TENSORS, folder / "model.pth")
    return folder / "model.pth"


def directory(folder: Path) -> Path:
    (folder / "model.safetensors").mkdir()
    return folder / "model.safetensors"


def damaged(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder / "model.safetensors"


NO_CARDS = {
    "no-metadata": lambda folder: write(folder / "model.safetensors", None),
    "other-metadata": lambda folder: write(folder / "model.safetensors", {"format": "pt"}),
    "pickle": pickled,
    "missing": lambda folder: folder / "model.safetensors",
    "directory": directory,
    "empty": lambda folder: damaged(folder, b""),
    "text": lambda folder: damaged(folder, b"not found\n" * 9),
    "named-otherwise": lambda folder: write(folder / "model.bin", CARDS["measured"].to_metadata()),
}


@pytest.mark.parametrize("case", NO_CARDS)
def test_files_without_a_card(case, tmp_path):
    assert read_model_card(NO_CARDS[case](tmp_path)) is None


def test_suffix_in_capitals(tmp_path):
    path = write(tmp_path / "MODEL.SAFETENSORS", CARDS["measured"].to_metadata())
    assert read_model_card(path) == CARDS["measured"]


def refusal(path: Path, text: str) -> str:
    """The one-line message with which a file with that text as its card is refused."""
    (key,) = CARDS["measured"].to_metadata()
    write(path, {key: text})
    with pytest.raises(ValueError) as caught:
        read_model_card(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: its model card cannot be understood (") and "\n" not in message
    return message


TEXTS = {
    "empty": "",
    "text": "resnet20",
    "cut-off": CARDS["measured"].to_metadata()["model_card"][:-9],
    "list": "[1, 2]",
    "number": "3",
    "nothing": "null",
    "no-entries": "{}",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_cards_are_refused(case, tmp_path):
    refusal(tmp_path / "model.safetensors", TEXTS[case])


def record(**changes: Any) -> dict[str, Any]:
    return {**json.loads(CARDS["measured"].to_metadata()["model_card"]), **changes}


# changes to a sound card, and the words that must say so
MALFORMED = {
    "unknown-model": ({"model": "resnet21"}, "unknown model 'resnet21'"),
    "model-number": ({"model": 20}, "unknown model 20"),
    "model-list": ({"model": ["resnet20"]}, "unhashable"),
    "preprocessing-nothing": ({"preprocessing": None}, "expected the description of a preprocessing, got None"),
    "preprocessing-empty": ({"preprocessing": {}}, "expected the description of a preprocessing"),
    "preprocessing-std": ({"preprocessing": {**GREY.to_json(), "std": [0]}}, "positive deviations"),
    "preprocessing-step": ({"preprocessing": {**GREY.to_json(), "rotate": 90}}, "unknown steps"),
    "classes-number": ({"classes": 10}, "expected a list of classes, got 10"),
    "classes-text": ({"classes": "cat"}, "expected a list of classes, got 'cat'"),
    "classes-mapping": ({"classes": {"cat": 0}}, "expected a list of classes, got {'cat': 0}"),
    "accuracy-text": ({"accuracy": "high"}, "could not convert"),
    "accuracy-percent": ({"accuracy": 97.2}, "accuracy between 0 and 1, got 97.2"),
    "accuracy-negative": ({"accuracy": -0.1}, "accuracy between 0 and 1"),
    "accuracy-nan": ({"accuracy": float("nan")}, "accuracy between 0 and 1, got nan"),
    "images-text": ({"test_images": "many"}, "invalid literal"),
    "images-infinite": ({"test_images": float("inf")}, "infinity"),
    "images-nan": ({"test_images": float("nan")}, "NaN"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_cards_are_refused(case, tmp_path):
    changes, expected = MALFORMED[case]
    assert expected in refusal(tmp_path / "model.safetensors", json.dumps(record(**changes)))


@pytest.mark.parametrize("key", record())
def test_cards_with_a_missing_entry_are_refused(key, tmp_path):
    entries = record()
    del entries[key]
    assert f"('{key}')" in refusal(tmp_path / "model.safetensors", json.dumps(entries))
