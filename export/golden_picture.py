"""The golden picture: a picture and the input that it becomes, for an application to test its own preprocessing on."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.base.errors import ExportError
from export.runtime.bundle.golden import PICTURE_FILE, PICTURE_INPUT_FILE
from export.sample_inputs import photographs

_MODES = {1: "L", 3: "RGB"}  # Pillow's names
_SIDE = 1.5  # the picture's shorter side over the longer one of what it is scaled to: it has to shrink


class PicturePreprocessing(Protocol):
    """From pictures to inputs of one network."""

    def to_json(self) -> dict[str, Any]:
        """What it does; `mean` and `std` of it are by channel."""

    def __call__(self, pictures: Sequence[Image.Image]) -> NDArray:
        """Pictures -> inputs [N, C, H, W] float32, or bytes [N, H, W, C]."""


def golden_picture(preprocessing: PicturePreprocessing, inputs: NDArray) -> dict[str, bytes]:
    """A picture, and the input that it becomes, as files of a bundle: what an application tests its own steps on.

    It is a photograph, oblong and larger than the input, so that a picture that is sampled, not averaged, becomes
    another input; grey where the network's are.

    Args:
        preprocessing: from the picture to the input.
        inputs: [N, ...] of the network, of which the shape and type count.

    Raises:
        ExportError: what is made of the picture is no input of the network.
    """
    record = preprocessing.to_json()
    channels = len(record["mean"])
    height, width = inputs.shape[1:3] if inputs.dtype == np.uint8 else inputs.shape[2:4]
    photograph, side = photographs()[0], round(_SIDE * max(height, width, *record.get("resize", ())))
    repeats = math.ceil(side / photograph.height)
    tiled = Image.fromarray(np.tile(np.asarray(photograph), (repeats, repeats, 1)))
    picture = tiled.resize((side * tiled.width // tiled.height, side), Image.Resampling.BICUBIC)
    picture = picture.convert(_MODES[channels])
    made = preprocessing([picture])
    if made.shape != (1, *inputs.shape[1:]) or made.dtype != inputs.dtype:
        raise ExportError(
            f"expected a preprocessing that makes inputs [N, *{list(inputs.shape[1:])}] {inputs.dtype}, "
            f"got {list(made.shape)} {made.dtype}"
        )
    files = {PICTURE_FILE: io.BytesIO(), PICTURE_INPUT_FILE: io.BytesIO()}
    picture.save(files[PICTURE_FILE], format="PNG")
    np.save(files[PICTURE_INPUT_FILE], made)
    return {name: stream.getvalue() for name, stream in files.items()}
