"""Which network of the family some tensors are: told by their names and shapes alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet.errors import ResNetError
from resnet.models import MODELS, create_model


@dataclass(frozen=True)
class Recognised:
    """What create_model must be given for the tensors to fit.

    Attributes:
        name: a key of MODELS.
        num_classes: rows of fc.weight.
        in_channels: input channels of conv1.weight.
        certain: False for the plain networks, whose tensors are also those of a residual network with shortcuts
            that pad with zeros.
    """

    name: str
    num_classes: int
    in_channels: int
    certain: bool

    def __str__(self) -> str:
        channels = f" and {self.in_channels} input channels" if self.in_channels != 3 else ""
        return f"{self.name} with {self.num_classes} classes{channels}"


def recognise(tensors: Mapping[str, Tensor]) -> Recognised | None:
    """The network whose tensors these are, each of its shape; None where there is none in the family."""
    depths: dict[int, set[int]] = {}
    for name in tensors:
        if block := re.match(r"layer(\d{1,2})\.(\d{1,4})\.", name):
            depths.setdefault(int(block[1]), set()).add(int(block[2]))
    counted = tuple(len(depths[stage]) for stage in sorted(depths))
    stem, head = tensors.get("conv1.weight"), tensors.get("fc.weight")
    if stem is None or head is None or stem.dim() != 4 or head.dim() != 2:
        return None
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    for name, spec in MODELS.items():
        if spec.depths != counted:
            continue
        try:
            with torch.device("meta"):
                model = create_model(name, num_classes=head.shape[0], in_channels=stem.shape[1])
        except (ResNetError, RuntimeError):
            return None  # no classes, or more than any model has
        expected = {n: t.shape for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
        if expected == shapes:
            return Recognised(name, head.shape[0], stem.shape[1], not name.startswith("plain"))
    return None
