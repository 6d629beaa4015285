"""What a user says of preprocessing and of classes: by a name, in a file, value by value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from resnet.data.labelled import DataError
from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, imagenet_preprocessing

DIGITS = Preprocessing((16, 16), (16, 16), (0.3055,), (0.3187,))
PRESETS = ("imagenet", "digits")
_TIMM_SIZE, _TIMM_CROP = 224, 0.875  # what timm's resolve_data_config takes where a configuration does not say


@dataclass(frozen=True)
class Preset:
    """A preprocessing, and the names of the classes where what describes it has them too."""

    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None


def open_preset(name: str, channels: int | None, size: tuple[int, int]) -> Preset:
    """A preset by its name, or the file of one.

    Args:
        name: `imagenet`: what torchvision's first weights expect; `digits`: what trained the network that ships with
            this repository; else a JSON file with a data configuration of timm, such as the `config.json` beside
            weights on the Hugging Face hub or a model's `pretrained_cfg`.
        channels: of the network, None where that is not known.
        size: of its input, height and width; a preset that is for one size says another.

    Raises:
        DataError: neither, a configuration that is not understood, or one for other channels.
    """
    if name == "imagenet":
        found = imagenet_preprocessing(3 if channels is None else channels)
        preset = None if found is None else Preset(found.at(size))
    elif name == "digits":
        preset = Preset(DIGITS)
    else:
        preset = _timm(Path(name))
    if preset is None or channels not in (None, preset.preprocessing.channels):
        held = "1 or 3" if preset is None else preset.preprocessing.channels
        raise DataError(f"open_preset(name={name!r}) is for {held} channels, the network takes {channels}")
    return preset


def _timm(path: Path) -> Preset:
    """As timm's `create_transform(**resolve_data_config(pretrained_cfg=...))` prepares pictures for evaluation."""
    if not path.is_file():
        expected = f"expected {', '.join(PRESETS)} or a JSON file with a data configuration of timm"
        raise DataError(f"open_preset(name={str(path)!r}): {expected} (no such file)")
    try:
        record = json.loads(path.read_text("utf-8"))
        config = record.get("pretrained_cfg", record)
        if not isinstance(config, Mapping) or not {"mean", "std", "input_size", "interpolation"} & config.keys():
            raise ValueError("it has no mean, std, input_size or interpolation")
        channels, height, width = map(int, config.get("input_size") or (3, _TIMM_SIZE, _TIMM_SIZE))
        pct, mode = float(config.get("crop_pct") or _TIMM_CROP), config.get("crop_mode") or "center"
        if mode not in ("center", "squash"):
            raise ValueError(f"crop_mode center or squash, got {mode!r:.80}")
        if mode == "center" and height != width:
            raise ValueError(f"crop_mode squash for oblong inputs, whose longer side timm rounds, got {mode!r}")
        preprocessing = Preprocessing(
            (height, width),
            (math.floor(height / pct), math.floor(width / pct)),
            _by_channel(config.get("mean") or IMAGENET_MEAN, channels),
            _by_channel(config.get("std") or IMAGENET_STD, channels),
            config.get("interpolation") or "bicubic",
            keep_aspect=mode == "center",
        )
        return Preset(preprocessing, _label_names(record, record.get("num_classes") or config.get("num_classes")))
    except (ValueError, TypeError, AttributeError, OverflowError, ZeroDivisionError, OSError, RecursionError) as error:
        raise DataError(f"{path}: expected a data configuration of timm ({error})") from error


def _by_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    return found * channels if len(found) == 1 else found


def _label_names(record: Mapping[str, Any], count: object) -> tuple[str, ...] | None:
    """Those that timm puts into `config.json`: a list, or a dictionary by the number of the class."""
    names = record.get("label_names")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != count:
        return None
    return tuple(names)


@dataclass(frozen=True)
class Changes:
    """What is said value by value, over whatever else describes a preprocessing; None was not said.

    Attributes:
        mean, std: one per channel, or one for all.
        resize: one number, the length of the shorter side of the scaled picture; or its height and width.
        crop: height and width of what is cut out of the middle: the network's input.
        interpolation: a key of INTERPOLATIONS.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: tuple[int, ...] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """The fields that are, as `Changes.mean`."""
        return tuple(f"Changes.{field.name}" for field in fields(self) if getattr(self, field.name) is not None)

    def of(self, base: Preprocessing, fixed_size: bool) -> Preprocessing:
        """The preprocessing with these changes.

        Args:
            base: what holds where nothing is said.
            fixed_size: whether its `size` is to stay where only `resize` is said: somebody said it too.

        Raises:
            DataError: values that do not fit the channels or each other, or are meant for pixels from 0 to 255.
        """
        size, resize, keep_aspect = base.size, base.resize, base.keep_aspect
        if self.resize is not None:
            keep_aspect, resize = len(self.resize) == 1, (self.resize[0], self.resize[-1])
            size = size if keep_aspect or fixed_size else resize
        size = self.crop or size
        if any(r < s for r, s in zip(resize, size, strict=True)):
            (height, width), (tall, wide) = size, resize
            raise DataError(
                f"pictures are scaled to {tall}x{wide} and {height}x{width} is cut out of that: expected no more than "
                "there is; Changes.resize and Changes.crop say both"
            )
        mean, std = self._statistics("mean", self.mean, base.mean), self._statistics("std", self.std, base.std)
        interpolation = self.interpolation or base.interpolation
        return replace(
            base, size=size, resize=resize, mean=mean, std=std, interpolation=interpolation, keep_aspect=keep_aspect
        )

    def _statistics(self, name: str, values: tuple[float, ...] | None, held: tuple[float, ...]) -> tuple[float, ...]:
        if values is None:
            return held
        if len(values) not in (1, len(held)):
            raise DataError(f"Changes.{name}: expected {len(held)} values, one per channel, or one, got {len(values)}")
        if any(abs(value) > 1 for value in values):
            scaled = " ".join(f"{value / 255:.6g}" for value in values)
            raise DataError(
                f"Changes.{name}: expected it of x / 255, where x is 0 to 255, got {' '.join(map(str, values))}; "
                f"divided by 255 that is {scaled}"
            )
        return values if len(values) == len(held) else values * len(held)


@dataclass(frozen=True)
class Said:
    """What is said of a network that may say itself how its pictures are prepared.

    Attributes:
        preset: as `open_preset` takes it; None was not said.
        changes: value by value.
    """

    preset: str | None = None
    changes: Changes = field(default_factory=Changes)

    def of(self, record: Mapping[str, Any] | None, shape: tuple[int, ...], as_bytes: bool) -> Preprocessing:
        """What the network says, else what is said here.

        Args:
            record: what the network says, None for nothing.
            shape: of its input: (C, H, W), or (H, W, C) of bytes.
            as_bytes: whether that is bytes.

        Raises:
            DataError: both say it, or neither.
        """
        said = (*(("open_preset(name=...)",) if self.preset else ()), *self.changes.said)
        if record is not None:
            if said:
                raise DataError(f"{said[0]}: it says itself how its pictures are prepared, expected nothing of that")
            return replace(Preprocessing.from_json(record), as_bytes=as_bytes)
        if not said:
            raise DataError(
                "it does not say how its pictures are prepared: open_preset(name='imagenet'), or another, does"
            )
        height, width, channels = shape if as_bytes else (*shape[1:], shape[0])
        base = open_preset(self.preset or "imagenet", channels, (height, width)).preprocessing
        return replace(self.changes.of(base, fixed_size=True), as_bytes=as_bytes)


def read_classes(path: Path) -> tuple[str, ...]:
    """The names of classes in a text file, one per line in the order of the network's outputs.

    Raises:
        DataError: the file cannot be read; an empty line; a name twice; no names.
    """
    if not path.is_file():  # opening a pipe would wait for whoever writes to it
        raise DataError(f"{path}: expected the names of the classes, one per line (no such file)")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected the names of the classes, one per line (it is not UTF-8)") from error
    names = tuple(line.strip() for line in lines)
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{path}: expected the name of a class on every line, line {number} is empty")
        if name in first:
            raise DataError(f"{path}: expected every class once, got {name!r:.80} on lines {first[name]} and {number}")
        first[name] = number
    if not names:
        raise DataError(f"{path}: expected the names of the classes, one per line, got an empty file")
    return names
