"""The networks of the family once more, from a state dict alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def restated(
    state: Mapping[str, Tensor], x: Tensor, groups: int = 1, statistics: dict[str, Tensor] | None = None
) -> Tensor:
    """The forward pass written out, with BatchNorm as its formula.

    Args:
        state: tensors by their published names.
        x: images [N, C, H, W].
        groups: of the 3x3 convolutions of bottlenecks.
        statistics: in training, where BatchNorm takes those of `x`: receives the running ones as they are afterwards.
    """

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], None, stride, padding, groups=groups)
        gamma, beta = (state[f"{norm}.{part}"][:, None, None] for part in ("weight", "bias"))
        if statistics is None:
            mean, var = (state[f"{norm}.running_{part}"][:, None, None] for part in ("mean", "var"))
        else:
            mean = x.mean((0, 2, 3), keepdim=True)
            var, count = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True), x[:, 0].numel()
            for part, value in (("mean", mean), ("var", var * count / (count - 1))):
                key = f"{norm}.running_{part}"
                statistics[key] = 0.9 * state[key] + 0.1 * value.detach().flatten()
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    large = state["conv1.weight"].shape[-1] == 7
    x = conv_norm(x, "conv1", "bn1", 2 if large else 1, 3 if large else 1).clamp(min=0)
    if large:
        x = F.max_pool2d(x, 3, 2, 1)
    shortcuts = any("downsample" in key for key in state)
    blocks = dict.fromkeys(tuple(key.split(".")[:2]) for key in state if key.startswith("layer"))
    for stage, index in blocks:
        at, stride = f"{stage}.{index}", 2 if stage != "layer1" and index == "0" else 1
        if f"{at}.conv3.weight" in state:
            y = conv_norm(x, f"{at}.conv1", f"{at}.bn1").clamp(min=0)
            y = conv_norm(y, f"{at}.conv2", f"{at}.bn2", stride, 1, groups).clamp(min=0)
            y = conv_norm(y, f"{at}.conv3", f"{at}.bn3")
        else:
            y = conv_norm(x, f"{at}.conv1", f"{at}.bn1", stride, 1).clamp(min=0)
            y = conv_norm(y, f"{at}.conv2", f"{at}.bn2", 1, 1)
        if f"{at}.downsample.0.weight" in state:
            x = conv_norm(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
        x = (x + y if shortcuts else y).clamp(min=0)
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
