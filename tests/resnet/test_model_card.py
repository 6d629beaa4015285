"""Model cards: what is written into a safetensors file comes back, and what cannot be understood is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from resnet.data.preprocessing import Preprocessing
from resnet.errors import ResNetError
from resnet.model_card import ModelCard, read_model_card
from tests.resnet.checks import refusal

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


@pytest.mark.parametrize("case", CARDS)
def test_round_trip(case: str, tmp_path: Path) -> None:
    metadata = CARDS[case].to_metadata()
    for name in ("model.safetensors", "MODEL.SAFETENSORS"):
        path = write(tmp_path / name, {**metadata, "format": "pt"})
        assert read_model_card(path) == read_model_card(str(path)) == CARDS[case]
        assert torch.equal(safetensors.torch.load_file(path)["fc.bias"], TENSORS["fc.bias"])


# a name, and what is there: nothing that holds a card
NO_CARDS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no-metadata": ("model.safetensors", lambda path: write(path, None)),
    "other-metadata": ("model.safetensors", lambda path: write(path, {"format": "pt"})),
    "pickle": ("model.pth", lambda path: torch.save(TENSORS, path)),
    "directory": ("model.safetensors", Path.mkdir),
    "text": ("model.safetensors", lambda path: path.write_bytes(b"not found\n" * 9)),
    "named-otherwise": ("model.bin", lambda path: write(path, CARDS["measured"].to_metadata())),
}


@pytest.mark.parametrize("case", NO_CARDS)
def test_files_without_a_card(case: str, tmp_path: Path) -> None:
    name, make = NO_CARDS[case]
    make(tmp_path / name)
    assert read_model_card(tmp_path / name) is None


def record(**changes: Any) -> dict[str, Any]:
    return {**json.loads(CARDS["measured"].to_metadata()["model_card"]), **changes}


# what is written in place of a sound card, and the words that must say so
MALFORMED: dict[str, tuple[str, str]] = {
    **{text[:9]: (text, "") for text in ("", "resnet20", "[1, 2]", "3", "null", "{}", "[" * 100_000)},
    "cut-off": (json.dumps(record())[:-9], ""),
    **{
        name: (json.dumps(record(**changes)), expected)
        for name, changes, expected in (
            ("unknown-model", {"model": "resnet21"}, "unknown model 'resnet21'"),
            ("model-list", {"model": ["resnet20"]}, "unhashable"),
            ("preprocessing", {"preprocessing": None}, "expected the description of a preprocessing, got None"),
            ("classes-mapping", {"classes": {"cat": 0}}, "expected a list of classes, got {'cat': 0}"),
            ("accuracy-percent", {"accuracy": 97.2}, "accuracy between 0 and 1, got 97.2"),
            ("accuracy-nan", {"accuracy": float("nan")}, "accuracy between 0 and 1, got nan"),
            ("images-infinite", {"test_images": float("inf")}, "infinity"),
            ("images-nan", {"test_images": float("nan")}, "NaN"),
        )
    },
    **{
        f"without-{missing}": (json.dumps({key: value for key, value in record().items() if key != missing}), missing)
        for missing in record()
    },
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_cards_are_refused(case: str, tmp_path: Path) -> None:
    text, expected = MALFORMED[case]
    path = write(tmp_path / "model.safetensors", {"model_card": text})
    message = refusal(ResNetError, read_model_card, path)
    assert message.startswith(f"{path}: its model card cannot be understood (") and expected in message
