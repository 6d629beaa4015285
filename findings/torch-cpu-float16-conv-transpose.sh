#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: a transposed convolution of float16 rounds after every tap.
#
# A convolution of float16 is accumulated in float32 and rounded once: its error is that of one rounding of the result.
# conv_transpose2d with overlapping windows adds the taps' contributions up in float16 instead, so its error is larger;
# GPUs accumulate these in float32 too. An eager float16 model on a CPU is therefore no measure of what rounding costs
# a network with learned upsampling.
#
# Seen with torch 2.13.0+cpu: error in units of one rounding of the result: conv2d 1.0, conv_transpose2d above 1.4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
print("torch", torch.__version__)
x = torch.rand(4, 32, 16, 16).half()
forward = torch.randn(16, 32, 4, 4).div(16).half()
transposed = torch.randn(32, 16, 4, 4).div(16).half()


def in_roundings(y, exact):
    """The error over that of rounding the exact result once, both in root mean square."""
    once = exact.half().double() - exact
    return ((y.double() - exact).square().mean() / once.square().mean()).sqrt().item()


plain = torch.nn.functional.conv2d(x, forward, stride=2, padding=1)
plain64 = torch.nn.functional.conv2d(x.double(), forward.double(), stride=2, padding=1)
up = torch.nn.functional.conv_transpose2d(x, transposed, stride=2, padding=1)
up64 = torch.nn.functional.conv_transpose2d(x.double(), transposed.double(), stride=2, padding=1)
one, many = in_roundings(plain, plain64), in_roundings(up, up64)
print(f"conv2d           {one:.2f} roundings")
print(f"conv_transpose2d {many:.2f} roundings")
assert one < 1.1, "conv2d rounds more than once now"
assert many > 1.4, "conv_transpose2d rounds once now: this finding is out of date"
PYTHON
