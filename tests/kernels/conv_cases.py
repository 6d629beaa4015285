"""The convolutions the kernels are tested on, as problems by readable id.

Images are cropped to a few pixels, since the interpreter is slow; channel counts are the real ones.
"""

from dataclasses import replace

import torch

from kernels.config import ConvProblem

# (c_in, c_out, kernel, stride, padding, groups): every distinct convolution of each network.
RESNET18 = (
    (3, 64, 7, 2, 3, 1),
    (64, 64, 3, 1, 1, 1),
    (64, 128, 3, 2, 1, 1),
    (64, 128, 1, 2, 0, 1),
    (128, 128, 3, 1, 1, 1),
    (128, 256, 3, 2, 1, 1),
    (128, 256, 1, 2, 0, 1),
    (256, 256, 3, 1, 1, 1),
    (256, 512, 3, 2, 1, 1),
    (256, 512, 1, 2, 0, 1),
    (512, 512, 3, 1, 1, 1),
)
RESNET50 = (
    (3, 64, 7, 2, 3, 1),
    (64, 64, 1, 1, 0, 1),
    (64, 64, 3, 1, 1, 1),
    (64, 256, 1, 1, 0, 1),
    (256, 64, 1, 1, 0, 1),
    (256, 128, 1, 1, 0, 1),
    (128, 128, 3, 2, 1, 1),
    (128, 512, 1, 1, 0, 1),
    (256, 512, 1, 2, 0, 1),
    (512, 128, 1, 1, 0, 1),
    (128, 128, 3, 1, 1, 1),
    (512, 256, 1, 1, 0, 1),
    (256, 256, 3, 2, 1, 1),
    (256, 1024, 1, 1, 0, 1),
    (512, 1024, 1, 2, 0, 1),
    (1024, 256, 1, 1, 0, 1),
    (256, 256, 3, 1, 1, 1),
    (1024, 512, 1, 1, 0, 1),
    (512, 512, 3, 2, 1, 1),
    (512, 2048, 1, 1, 0, 1),
    (1024, 2048, 1, 2, 0, 1),
    (2048, 512, 1, 1, 0, 1),
    (512, 512, 3, 1, 1, 1),
)
RESNEXT50_32X4D = (
    (3, 64, 7, 2, 3, 1),
    (64, 128, 1, 1, 0, 1),
    (128, 128, 3, 1, 1, 32),
    (128, 256, 1, 1, 0, 1),
    (64, 256, 1, 1, 0, 1),
    (256, 128, 1, 1, 0, 1),
    (256, 256, 1, 1, 0, 1),
    (256, 256, 3, 2, 1, 32),
    (256, 512, 1, 1, 0, 1),
    (256, 512, 1, 2, 0, 1),
    (512, 256, 1, 1, 0, 1),
    (256, 256, 3, 1, 1, 32),
    (512, 512, 1, 1, 0, 1),
    (512, 512, 3, 2, 1, 32),
    (512, 1024, 1, 1, 0, 1),
    (512, 1024, 1, 2, 0, 1),
    (1024, 512, 1, 1, 0, 1),
    (512, 512, 3, 1, 1, 32),
    (1024, 1024, 1, 1, 0, 1),
    (1024, 1024, 3, 2, 1, 32),
    (1024, 2048, 1, 1, 0, 1),
    (1024, 2048, 1, 2, 0, 1),
    (2048, 1024, 1, 1, 0, 1),
    (1024, 1024, 3, 1, 1, 32),
)
CIFAR_RESNET20 = (
    (3, 16, 3, 1, 1, 1),
    (16, 16, 3, 1, 1, 1),
    (16, 32, 3, 2, 1, 1),
    (16, 32, 1, 2, 0, 1),
    (32, 32, 3, 1, 1, 1),
    (32, 64, 3, 2, 1, 1),
    (32, 64, 1, 2, 0, 1),
    (64, 64, 3, 1, 1, 1),
)


def _network_cases() -> dict[str, ConvProblem]:
    cases = {}
    shapes = dict.fromkeys(RESNET18 + RESNET50 + RESNEXT50_32X4D + CIFAR_RESNET20)
    for index, (c_in, c_out, kernel, stride, padding, groups) in enumerate(shapes):
        name = f"{c_in}-{c_out}-{kernel}x{kernel}-s{stride}" + (f"-g{groups}" if groups > 1 else "")
        cases[name] = ConvProblem(
            batch=1 + index % 2,
            c_in=c_in,
            height=7 + index % 3,
            width=9 - index % 2,
            c_out=c_out,
            kernel=(kernel, kernel),
            stride=(stride, stride),
            padding=(padding, padding),
            groups=groups,
            # The last convolution of a block, the only one with a residual, is a 1x1 or a 3x3 of stride 1.
            has_residual=stride == 1 and c_out >= c_in,
            relu=True,
        )
    return cases


NETWORK_CASES = _network_cases()

_SMALL = ConvProblem(2, 32, 6, 7, 40, (3, 3), padding=(1, 1), has_residual=True, relu=True)

ODD_CASES = {
    "small": _SMALL,
    "one-pixel-image": replace(_SMALL, height=1, width=1),
    "one-channel-in-and-out": replace(_SMALL, c_in=1, c_out=1),
    "c_in-5": replace(_SMALL, c_in=5),
    "c_in-13-1x1": replace(_SMALL, c_in=13, kernel=(1, 1), padding=(0, 0)),
    "c_in-100": replace(_SMALL, c_in=100),
    "c_out-1000": replace(_SMALL, c_out=1000, kernel=(1, 1), padding=(0, 0)),
    "batch-5": replace(_SMALL, batch=5),
    "image-33x1": replace(_SMALL, height=33, width=1),
    "image-3x50": replace(_SMALL, height=3, width=50),
    "kernel-1x7": replace(_SMALL, kernel=(1, 7), padding=(0, 3)),
    "kernel-5x2-stride-1x3": replace(_SMALL, kernel=(5, 2), padding=(2, 0), stride=(1, 3)),
    "kernel-is-the-image": replace(_SMALL, kernel=(6, 7), padding=(0, 0)),
    "stride-3x2": replace(_SMALL, stride=(3, 2)),
    "stride-over-kernel": replace(_SMALL, kernel=(1, 1), padding=(0, 0), stride=(4, 5)),
    "padding-0": replace(_SMALL, padding=(0, 0)),
    "padding-2x0": replace(_SMALL, padding=(2, 0)),
    "padding-0x3": replace(_SMALL, padding=(0, 3)),
    "padding-over-kernel": replace(_SMALL, kernel=(1, 1), padding=(2, 1)),
    "dilation-2": replace(_SMALL, dilation=(2, 2), padding=(2, 2)),
    "dilation-1x3": replace(_SMALL, dilation=(1, 3), padding=(1, 0)),
    "groups-2": replace(_SMALL, groups=2),
    "groups-5-c_in-15": replace(_SMALL, c_in=15, groups=5),
    "groups-4-1x1": replace(_SMALL, groups=4, kernel=(1, 1), padding=(0, 0)),
    "depthwise": replace(_SMALL, c_in=24, c_out=24, groups=24),
    "depthwise-multiplier-2": replace(_SMALL, c_in=12, c_out=24, groups=12, stride=(2, 2)),
}

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# What ahead-of-time compilation is checked on, at real sizes: every shape of load and every width of tile.
COMPILED_CASES = {
    "stem-7x7": ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True),
    "64-256-1x1-residual": ConvProblem(8, 64, 56, 56, 256, (1, 1), has_residual=True, relu=True),
    "64-64-3x3": ConvProblem(8, 64, 56, 56, 64, (3, 3), padding=(1, 1), relu=True),
    "512-512-3x3-residual": ConvProblem(128, 512, 7, 7, 512, (3, 3), padding=(1, 1), has_residual=True, relu=True),
    "512-512-3x3-batch-1": ConvProblem(1, 512, 7, 7, 512, (3, 3), padding=(1, 1), relu=True),
    "128-128-3x3-s2": ConvProblem(8, 128, 56, 56, 128, (3, 3), (2, 2), (1, 1), relu=True),
    "256-512-1x1-s2": ConvProblem(8, 256, 56, 56, 512, (1, 1), (2, 2)),
    "128-128-3x3-g32": ConvProblem(8, 128, 56, 56, 128, (3, 3), padding=(1, 1), groups=32, relu=True),
    "256-256-3x3-bf16": ConvProblem(32, 256, 14, 14, 256, (3, 3), padding=(1, 1), dtype=torch.bfloat16, relu=True),
    "64-256-1x1-residual-fp32": ConvProblem(
        8, 64, 56, 56, 256, (1, 1), dtype=torch.float32, has_residual=True, relu=True
    ),
}
