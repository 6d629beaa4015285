#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: which library computes a 1x1 convolution of float32 depends on the number of threads.
#
# With one thread, and fewer than 16 images, it is laid out as a matrix product of the BLAS that PyTorch was built with
# (MKL); with two it is oneDNN's, as convolutions of all other kernels are. The results differ in their last bits, so a
# comparison "to the bit" between two machines, or of OMP_NUM_THREADS=1 with the default, fails with nothing wrong. On
# AMD's processors, where MKL leaves out AVX-512, one thread also takes twice as long as oneDNN does on one thread:
# torch.mkldnn_convolution calls it whatever the number.
#
# Seen with torch 2.13.0: 1 thread aten::_slow_conv2d_forward, 2 threads aten::mkldnn_convolution; on an AMD EPYC of the
# fifth generation with one thread 93 and 211 billion operations a second.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

torch.manual_seed(0)
print("torch", torch.__version__)
channels_last = torch.channels_last
x = torch.randn(8, 512, 28, 28).contiguous(memory_format=channels_last)
weight = torch.randn(128, 512, 1, 1).contiguous(memory_format=channels_last)
wide = torch.randn(128, 512, 3, 3).contiguous(memory_format=channels_last)


def routines(kernel, threads):
    torch.set_num_threads(threads)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as record:
        F.conv2d(x, kernel)
    names = {event.name for event in record.events()}
    return names & {"aten::_slow_conv2d_forward", "aten::mkldnn_convolution"}


for threads in (1, 2):
    print(f"{threads} thread(s): 1x1 {routines(weight, threads)}, 3x3 {routines(wide, threads)}")
torch.set_num_threads(1)
for name, call in {
    "conv2d": lambda: F.conv2d(x, weight),
    "mkldnn_convolution": lambda: torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1),
}.items():
    call()
    started = time.process_time()
    for _ in range(5):
        call()
    print(f"{name}: {5 * 2 * 8 * 28 * 28 * 512 * 128 / (time.process_time() - started) / 1e9:.0f} billion operations/s")
own, other = F.conv2d(x, weight), torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), 1)
print("equal to the bit:", torch.equal(own, other))
assert routines(wide, 1) == routines(weight, 2) == {"aten::mkldnn_convolution"}, "oneDNN computes other convolutions now"
assert routines(weight, 1) == {"aten::_slow_conv2d_forward"}, "oneDNN is used with one thread now: out of date"
PYTHON
