"""What the kernels are tested on, as problems by readable id.

Images are cropped to a few pixels, since the interpreter is slow; channel counts are the real ones.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.problems import ConvProblem, Problem, Projection
from resnet.models import create_model

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _network_shapes() -> Iterator[tuple[int, int, int, int, int]]:
    """(c_in, c_out, kernel, stride, groups) of every convolution of three networks, and of a ResNeXt of its grouped."""
    with torch.device("meta"):
        models = {name: create_model(name) for name in ("resnet18", "resnet50", "resnet20", "resnext50_32x4d")}
    for name, model in models.items():
        for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
            shape = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])
            if conv.groups > 1:  # 4 of the 32 groups: each is a launch of its own to the interpreter
                yield shape[0] // 8, shape[1] // 8, *shape[2:], 4
            elif name != "resnext50_32x4d":
                yield *shape, 1


def _network_cases() -> dict[str, ConvProblem]:
    """Every distinct convolution of resnet18, resnet50, resnet20 and, of resnext50_32x4d, of those with groups."""
    cases = {}
    for index, (c_in, c_out, kernel, stride, groups) in enumerate(dict.fromkeys(_network_shapes())):
        name = f"{c_in}-{c_out}-{kernel}x{kernel}-s{stride}" + (f"-g{groups}" if groups > 1 else "")
        batch, height, width, padding = 1 + index % 2, 7 + index % 3, 9 - index % 2, kernel // 2
        # The last convolution of a block, the only one with a residual, is a 1x1 or a 3x3 of stride 1.
        residual = stride == 1 and c_out >= c_in
        cases[name] = ConvProblem(
            batch, c_in, height, width, c_out, (kernel, kernel), (stride, stride), (padding, padding),
            groups=groups, has_residual=residual, relu=True,
        )  # fmt: skip
    return cases


NETWORK_CASES = _network_cases()

SMALL = ConvProblem(2, 32, 6, 7, 40, (3, 3), padding=(1, 1), has_residual=True, relu=True)

ODD_CASES = {
    "small": SMALL,
    "one-pixel-image": replace(SMALL, height=1, width=1),
    "one-channel-in-and-out": replace(SMALL, c_in=1, c_out=1),
    "c_in-5": replace(SMALL, c_in=5),
    "c_in-13-1x1": replace(SMALL, c_in=13, kernel=(1, 1), padding=(0, 0)),
    "c_out-1000": replace(SMALL, c_out=1000, kernel=(1, 1), padding=(0, 0)),
    "image-33x1": replace(SMALL, height=33, width=1),
    "image-3x50": replace(SMALL, height=3, width=50),
    "kernel-1x7": replace(SMALL, kernel=(1, 7), padding=(0, 3)),
    "kernel-5x2-stride-1x3": replace(SMALL, kernel=(5, 2), padding=(2, 0), stride=(1, 3)),
    "kernel-is-the-image": replace(SMALL, kernel=(6, 7), padding=(0, 0)),
    "stride-over-kernel": replace(SMALL, kernel=(1, 1), padding=(0, 0), stride=(4, 5)),
    "padding-0": replace(SMALL, padding=(0, 0)),
    "padding-2x0": replace(SMALL, padding=(2, 0)),
    "padding-over-kernel": replace(SMALL, kernel=(1, 1), padding=(2, 1)),
    "dilation-2": replace(SMALL, dilation=(2, 2), padding=(2, 2)),
    "groups-2": replace(SMALL, groups=2),
    "groups-4-1x1": replace(SMALL, groups=4, kernel=(1, 1), padding=(0, 0)),
    "depthwise": replace(SMALL, c_in=10, c_out=10, groups=10),
    "depthwise-multiplier-2": replace(SMALL, c_in=6, c_out=12, groups=6, stride=(2, 2)),
}


def projected(conv: ConvProblem, c_in: int, stride: tuple[int, int] = (1, 1), beyond: int = 0) -> ConvProblem:
    """`conv` with a projection of c_in channels; `beyond` are the pixels after the last one that its stride reads."""
    height = (conv.out_height - 1) * stride[0] + 1 + min(beyond, stride[0] - 1)
    width = (conv.out_width - 1) * stride[1] + 1 + min(beyond, stride[1] - 1)
    return replace(conv, has_residual=False, projection=Projection(c_in, height, width, stride))


def _basic(width: int, c_in: int, size: int, beyond: int) -> ConvProblem:
    """The last convolution of a basic block that halves the image."""
    conv = ConvProblem(2, width, size, size + 1, width, (3, 3), padding=(1, 1), relu=True)
    return projected(conv, c_in, (2, 2), beyond)


def _pointwise(width: int, c_in: int, stride: int, beyond: int) -> ConvProblem:
    """The last convolution of a bottleneck with a projection."""
    return projected(ConvProblem(2, width, 4, 5, 4 * width, (1, 1), relu=True), c_in, (stride, stride), beyond)


_PROJECTED = projected(SMALL, 48, (2, 2))

# Every distinct projection of resnet18 and resnet50, then odd sizes. Even images leave a row unread, odd ones do not.
PROJECTION_CASES = {
    "basic-128": _basic(128, 64, 5, 1),
    "basic-256": _basic(256, 128, 4, 0),
    "basic-512": _basic(512, 256, 3, 1),
    "bottleneck-64-s1": _pointwise(64, 64, 1, 0),
    "bottleneck-128-s2": _pointwise(128, 256, 2, 1),
    "bottleneck-256-s2": _pointwise(256, 512, 2, 0),
    "bottleneck-512-s2": _pointwise(512, 1024, 2, 1),
    "odd-image": _PROJECTED,
    "even-image": projected(SMALL, 48, (2, 2), beyond=1),
    "stride-1": projected(SMALL, 48),
    "stride-1x3": projected(SMALL, 48, (1, 3), beyond=2),
    "one-pixel-image": projected(replace(SMALL, height=1, width=1), 48, (2, 2)),
    "main-stride-2": projected(replace(SMALL, stride=(2, 2)), 48, (4, 4), beyond=3),
    "tails-everywhere": projected(replace(SMALL, c_in=13, c_out=70), 37, (2, 2), beyond=1),
    "shortcut-wider-than-main": projected(replace(SMALL, c_in=5), 100),
}


def _bottleneck(width: int, c_in: int, stride: int, project: bool, size: tuple[int, int]) -> BottleneckProblem:
    """The last two convolutions of a bottleneck with c_in input channels."""
    first = ConvProblem(2, width, *size, width, (3, 3), (stride, stride), (1, 1), relu=True)
    shortcut = Projection(c_in, *size, (stride, stride)) if project else None
    return BottleneckProblem(first, 4 * width, has_residual=not project, projection=shortcut, relu=True)


_BOTTLENECK = BottleneckProblem(replace(SMALL, has_residual=False), 72, has_residual=True, relu=True)
_BOTTLENECK_PROJECTED = replace(_BOTTLENECK, has_residual=False, projection=Projection(48, 11, 13, (2, 2)))

# Every distinct pair of resnet50 (resnet101 and resnet152 repeat them), then odd sizes.
BOTTLENECK_CASES = {
    "64-identity": _bottleneck(64, 256, 1, False, (5, 7)),
    "64-projection-s1": _bottleneck(64, 64, 1, True, (5, 7)),
    "128-identity": _bottleneck(128, 512, 1, False, (5, 6)),
    "128-projection-s2": _bottleneck(128, 256, 2, True, (8, 9)),
    "256-identity": _bottleneck(256, 1024, 1, False, (4, 4)),
    "256-projection-s2": _bottleneck(256, 512, 2, True, (7, 6)),
    "512-identity": _bottleneck(512, 2048, 1, False, (3, 3)),
    "512-projection-s2": _bottleneck(512, 1024, 2, True, (5, 5)),
    "c_mid-40-residual": _BOTTLENECK,
    "c_mid-40-projection": _BOTTLENECK_PROJECTED,
    "c_mid-40-no-shortcut": replace(_BOTTLENECK, has_residual=False),
    "one-pixel-image": replace(_BOTTLENECK, first=replace(_BOTTLENECK.first, height=1, width=1)),
    "first-1x1": replace(_BOTTLENECK, first=replace(_BOTTLENECK.first, kernel=(1, 1), padding=(0, 0))),
    "first-dilation-2": replace(_BOTTLENECK, first=replace(_BOTTLENECK.first, dilation=(2, 2), padding=(2, 2))),
    "tails-everywhere": BottleneckProblem(
        replace(_BOTTLENECK.first, c_in=13, c_out=21), 70, projection=Projection(37, 12, 14, (2, 2)), relu=True
    ),
    "one-channel-between": replace(_BOTTLENECK, first=replace(_BOTTLENECK.first, c_out=1)),
}

_STEM = ConvProblem(2, 3, 19, 23, 64, (7, 7), (2, 2), (3, 3), relu=True)

STEM_CASES = {
    "resnet-odd": StemProblem(_STEM),
    "resnet-even": StemProblem(replace(_STEM, height=16, width=18)),
    "one-pixel-image": StemProblem(replace(_STEM, height=1, width=1)),
    "one-row": StemProblem(replace(_STEM, batch=1, height=2, width=21)),
    "one-column": StemProblem(replace(_STEM, batch=1, height=21, width=2)),
    "wide-image": StemProblem(replace(_STEM, batch=1, height=3, width=150)),
    "c_out-40": StemProblem(replace(_STEM, c_out=40)),
    # The last convolution of a deep stem.
    "32-64-3x3": StemProblem(ConvProblem(2, 32, 5, 6, 64, (3, 3), (1, 1), (1, 1), relu=True)),
    "13-20-3x3-no-padding": StemProblem(ConvProblem(2, 13, 7, 9, 20, (3, 3), (1, 1), (0, 0), relu=True)),
    "5x2-stride-1x3": StemProblem(ConvProblem(2, 8, 9, 20, 32, (5, 2), (1, 3), (2, 0), relu=True)),
}

HEAD_CASES = {
    "resnet18": HeadProblem(5, 512, 7, 7, 1000),
    "resnet50": HeadProblem(1, 2048, 7, 7, 1000),
    "resnet20": HeadProblem(17, 64, 8, 8, 10),
    "2048-channels-batch-17": HeadProblem(17, 2048, 2, 3, 33),
    "one-pixel": HeadProblem(5, 512, 1, 1, 10),
    "pixels-2x3": HeadProblem(5, 512, 2, 3, 33),
    "70-channels": HeadProblem(5, 70, 7, 7, 33),
    "70-channels-batch-1": HeadProblem(1, 70, 2, 3, 10),
    "one-channel-one-class": HeadProblem(17, 1, 7, 7, 1),
}

CASES: dict[str, Problem] = {
    **{f"conv {name}": problem for name, problem in {**NETWORK_CASES, **ODD_CASES}.items()},
    **{f"projection {name}": problem for name, problem in PROJECTION_CASES.items()},
    **{f"bottleneck {name}": problem for name, problem in BOTTLENECK_CASES.items()},
    **{f"stem {name}": problem for name, problem in STEM_CASES.items()},
    **{f"head {name}": problem for name, problem in HEAD_CASES.items()},
}
# One of each operator and each kind of shortcut.
ONE_OF_EACH: dict[str, Problem] = {
    "conv": SMALL,
    "projection": PROJECTION_CASES["odd-image"],
    "bottleneck-residual": BOTTLENECK_CASES["c_mid-40-residual"],
    "bottleneck-projection": BOTTLENECK_CASES["c_mid-40-projection"],
    "bottleneck-no-shortcut": BOTTLENECK_CASES["c_mid-40-no-shortcut"],
    "stem": STEM_CASES["c_out-40"],
    "head": HEAD_CASES["70-channels"],
}
# Those of CASES that no rule of thumb fits.
ODD = ("conv c_in-13-1x1", "conv depthwise-multiplier-2", "conv dilation-2", "conv kernel-5x2-stride-1x3",
       "projection tails-everywhere", "bottleneck tails-everywhere", "stem 13-20-3x3-no-padding")  # fmt: skip
