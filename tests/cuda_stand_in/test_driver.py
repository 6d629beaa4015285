"""The stand-in itself: what NVIDIA's driver refuses, and what it does no sooner than it must."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.children import run
from tests.cuda_stand_in.building import build_driver
from tests.cuda_stand_in.stand_in import Code, StandIn, emulator

PTX = """
.version 8.7
.target sm_90a
.visible .entry fill(.param .u64 .ptr .global .align 4 fill_param_0, .param .u32 fill_param_1)
.reqntid 32
{
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<4>;
	ld.param.b64 	%rd1, [fill_param_0];
	ld.param.b32 	%r1, [fill_param_1];
	mov.u32 	%r2, %tid.x;
	mul.wide.u32 	%rd2, %r2, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.b32 	[%rd3], %r1;
	ret;
$L__func_end0:
}
"""
CUBIN = b"\x7fELF" + bytes(200)

# Of each script: what it sees. `d` is the bindings' driver, `f` a function (*int, int), `x` 32 ints on the device.
BEFORE = """
import ctypes, sys
import numpy as np
from cuda.bindings import driver as d
def name(outcome): return outcome[0].name.removeprefix("CUDA_")
def launch(f, value, stream, address=None, threads=32, shared=0, pdl=False, grid=(1, 1, 1)):
    config = d.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.hStream, config.sharedMemBytes = stream, shared
    if pdl:
        attribute = d.CUlaunchAttribute()
        attribute.id = d.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    values = ctypes.c_uint64(int(x) if address is None else address), ctypes.c_uint32(value)
    pointers = (ctypes.c_void_p * 2)(*map(ctypes.addressof, values))
    return name(d.cuLaunchKernelEx(config, f, ctypes.addressof(pointers), 0))
def read():
    y = np.zeros(32, np.uint32)
    assert name(d.cuMemcpyDtoH(y.ctypes.data, x, 128)) == "SUCCESS"
    return y.tolist()
early = name(d.cuDeviceGet(0))
d.cuInit(0)
outside = name(d.cuMemAlloc(4))
context = d.cuDevicePrimaryCtxRetain(0)[1]
d.cuCtxPushCurrent(context)
code = bytes.fromhex(sys.argv[1])
loaded, module = d.cuModuleLoadData(code)
f = d.cuModuleGetFunction(module, b"fill")[1] if not loaded else None
x, stream = d.cuMemAlloc(128)[1], d.cuStreamCreate(1)[1]
d.cuMemcpyHtoD(x, np.zeros(32, np.uint32).ctypes.data, 128)
def begin():
    d.cuStreamBeginCapture(stream, d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
def wait(on):
    return name(d.cuStreamSynchronize(on))
def most_shared(size):
    attribute = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return name(d.cuFuncSetAttribute(f, attribute, size))
"""
ENCODE = """
def encode(shift=0, base=0, stride=64, box=16, swizzle=0):
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64,
        *[ctypes.c_void_p] * 4, *[ctypes.c_int] * 4)(d.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, 0)[1])
    room = np.zeros(256, np.uint8)
    at = room.ctypes.data + -room.ctypes.data % 64 + shift
    sizes = (ctypes.c_uint64 * 2)(16, 2), (ctypes.c_uint64 * 2)(stride, 128)
    sides = (ctypes.c_uint32 * 2)(box, 2), (ctypes.c_uint32 * 2)(1, 1)
    return d.CUresult(call(at, 7, 2, int(x) + base, *sizes, *sides, 0, swizzle, 2, 0)).name.removeprefix("CUDA_")
print(encode(), encode(shift=16), encode(base=8), encode(stride=40), encode(box=3), encode(box=16, swizzle=1))
"""

INVALID = "ERROR_INVALID_VALUE"
SEEN: dict[str, tuple[str, str]] = {
    "order": ("print(early, outside)", "ERROR_NOT_INITIALIZED ERROR_INVALID_CONTEXT"),
    "unknown symbol": ("print(name(d.cuModuleGetFunction(module, b'fil')))", "ERROR_NOT_FOUND"),
    "foreign code": ("print(name(d.cuModuleLoadData(bytes(400))))", "ERROR_INVALID_IMAGE"),
    "launches": (
        "print(launch(f, 1, stream, threads=64), launch(f, 1, stream, grid=(1, 70000, 1)))",
        f"{INVALID} {INVALID}",
    ),
    "shared memory": (
        "print(launch(f, 1, stream, shared=49153), most_shared(232449), most_shared(60000),"
        " launch(f, 1, stream, shared=60000))",
        f"{INVALID} {INVALID} SUCCESS SUCCESS",
    ),
    "nothing before its time": ("launch(f, 7, stream); print(read()[0], wait(stream), read()[31])", "0 SUCCESS 7"),
    "another stream": (
        "event, other = d.cuEventCreate(0)[1], d.cuStreamCreate(1)[1]; launch(f, 7, stream);"
        " d.cuEventRecord(event, stream); launch(f, 8, stream); d.cuStreamWaitEvent(other, event, 0);"
        " print(wait(other), read()[0])",
        "SUCCESS 7",
    ),
    "a graph": (
        "begin(); launch(f, 9, stream); refused = name(d.cuMemAlloc(4)); graph = d.cuStreamEndCapture(stream)[1];"
        " run = d.cuGraphInstantiate(graph, 0)[1]; wait(stream); before = read()[0]; d.cuGraphLaunch(run, stream);"
        " print(refused, before, wait(stream), read()[0])",
        "ERROR_STREAM_CAPTURE_UNSUPPORTED 0 SUCCESS 9",
    ),
    "waiting while capturing": (
        "begin(); print(wait(stream), name(d.cuStreamEndCapture(stream)))",
        "ERROR_STREAM_CAPTURE_UNSUPPORTED ERROR_STREAM_CAPTURE_INVALIDATED",
    ),
    "copies": (
        "y = np.zeros(64, np.uint32).ctypes.data; print(name(d.cuMemcpyHtoD(x, y, 132)),"
        " name(d.cuMemcpyHtoD(x, int(x), 4)), name(d.cuMemcpyDtoH(y, y, 4)))",
        f"{INVALID} {INVALID} {INVALID}",
    ),
    "outside its memory": (
        "launch(f, 1, stream, int(x) + 64); print(wait(stream), name(d.cuMemAlloc(4)))",
        "ERROR_ILLEGAL_ADDRESS ERROR_ILLEGAL_ADDRESS",
    ),
    "early start without a wait": ("launch(f, 1, stream, pdl=True); print(wait(stream))", "ERROR_LAUNCH_FAILED"),
    "tensor maps": (ENCODE, f"SUCCESS{5 * f' {INVALID}'}"),
}
OTHER = "print(loaded.name, name(d.cuDeviceGet(1)))"

Try = Callable[[str, str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Try:
    emulator()
    driver = build_driver(tmp_path_factory.mktemp("driver"))

    def attempt(script: str, target: str) -> subprocess.CompletedProcess[str]:
        folder: Path = tmp_path_factory.mktemp("device")
        with StandIn(folder, driver, [Code(CUBIN, 90, PTX)], target, memory=1 << 20) as device:
            return run([sys.executable, "-c", BEFORE + script, CUBIN.hex()], env=device.environment)

    return attempt


@pytest.mark.parametrize("name", SEEN)
def test_it_does_as_the_driver_does(name: str, attempt: Try) -> None:
    script, expected = SEEN[name]
    done = attempt(script, "sm_90")
    assert done.stdout.strip() == expected, done.stderr


def test_code_of_another_architecture_does_not_load(attempt: Try) -> None:
    assert attempt(OTHER, "sm_87").stdout.strip() == "CUDA_ERROR_NO_BINARY_FOR_GPU ERROR_INVALID_DEVICE"
