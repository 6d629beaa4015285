"""What a weights file says of itself: enough to build its model and to feed it. In the header of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from resnet.data.preprocessing import Preprocessing
from resnet.errors import ResNetError
from resnet.models import MODELS

_KEY = "model_card"


@dataclass(frozen=True)
class ModelCard:
    """Attributes:
    model: a key of MODELS.
    preprocessing: from a picture to the model's input.
    classes: what each logit stands for.
    data: name of the data set it was trained on.
    accuracy: top-1 on the test part of that data set, between 0 and 1; None where it was not measured.
    test_images: how many pictures that was measured on.
    """

    model: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    data: str
    accuracy: float | None = None
    test_images: int = 0

    def check(self, path: str | Path, model: str | None, num_classes: int | None, in_channels: int | None) -> None:
        """Compare the card of the file `path` with the arguments of the same names; None was not given.

        Raises:
            ResNetError: one is not what the file holds.
        """
        for name, given, held in (
            ("name", model, self.model),
            ("num_classes", num_classes, len(self.classes)),
            ("in_channels", in_channels, self.preprocessing.channels),
        ):
            if given is not None and given != held:
                raise ResNetError(f"create_model({name}={given!r}): {path} holds weights for {held}")

    def to_metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        record = {
            "model": self.model,
            "preprocessing": self.preprocessing.to_json(),
            "classes": list(self.classes),
            "data": self.data,
            "accuracy": self.accuracy,
            "test_images": self.test_images,
        }
        return {_KEY: json.dumps(record, sort_keys=True)}


def read_model_card(path: str | Path) -> ModelCard | None:
    """The card in a weights file; None where the file has none or is none, which `load_weights` will say better.

    Raises:
        ResNetError: the file has a card that cannot be understood.
    """
    if Path(path).suffix.lower() != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError):
        return None
    if text is None:
        return None
    try:
        return _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ResNetError(f"{path}: its model card cannot be understood ({error})") from error


def _parse(record: Mapping[str, Any]) -> ModelCard:
    if not isinstance(record["classes"], list):
        raise TypeError(f"expected a list of classes, got {record['classes']!r:.80}")
    card = ModelCard(
        model=record["model"],
        preprocessing=Preprocessing.from_json(record["preprocessing"]),
        classes=tuple(str(name) for name in record["classes"]),
        data=str(record["data"]),
        accuracy=None if record["accuracy"] is None else float(record["accuracy"]),
        test_images=int(record["test_images"]),
    )
    if card.model not in MODELS:
        raise ResNetError(f"unknown model {card.model!r:.80}")
    if card.accuracy is not None and not 0 <= card.accuracy <= 1:
        raise ResNetError(f"expected an accuracy between 0 and 1, got {card.accuracy}")
    return card
