"""What the file of a kernel engine may say: a sound one is read without loss, every other is refused in one line."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from export import ExportError
from export.runtime.engines.kernel_file import NAME, file_name, read_kernel_file
from export.runtime.engines.kernel_plan import Descriptor, Pointer, parameter_bytes, version
from tests.cuda_stand_in.files import BATCHES, broken_files, by_hand, packed, unpacked, weights

BROKEN = broken_files()


def test_a_sound_file_is_read_whole() -> None:
    file = read_kernel_file(by_hand(boxes=True))
    plan = file.plan
    assert (plan.target, plan.capability, plan.precision, plan.driver) == ("sm_90", (9, 0), "fp16", 12000)
    assert tuple(plan.batches) == BATCHES and plan.arena_bytes == plan.batches[20].arena
    assert plan.weights_bytes == plan.weights[-1].offset + weights()["w3"].nbytes
    assert {name: bytes(data) for name, data in file.weights.items()} == {n: w.tobytes() for n, w in weights().items()}
    assert [hashlib.sha256(code).hexdigest() for code in file.cubins.values()] == [k.cubin for k in plan.kernels]
    first, second = plan.batches[3].launches
    expected = Descriptor(Pointer("arena", 256), "float32", (3, 64), (64, 1), (16, 32), 3)
    assert first.arguments[0] == expected and first.arguments[4] == 3 and first.grid == (1, 1, 1)
    assert second.arguments[5] == Pointer("arena", plan.batches[3].zeroed[0])
    assert plan.kernels[0].pdl and not read_kernel_file(by_hand()).plan.kernels[0].pdl


@pytest.mark.parametrize("name", BROKEN)
def test_any_other_is_refused_in_one_line(name: str) -> None:
    content, words = BROKEN[name]
    with pytest.raises(ExportError) as error:
        read_kernel_file(content)
    said = str(error.value)
    assert said.startswith("not a kernel engine that this version reads: ") and "\n" not in said and len(said) < 400
    assert words in said, said


def test_every_byte_of_the_data_and_every_number_of_the_plan_counts() -> None:
    """A flipped bit is refused wherever it is, but in the padding behind the header and in an unread order of keys."""
    content = by_hand()
    for at in np.random.default_rng(0).integers(8, len(content), 300):
        changed = bytearray(content)
        changed[at] ^= 1
        with pytest.raises(ExportError):
            read_kernel_file(bytes(changed))


def test_a_device_is_refused_that_is_not_the_plan_s() -> None:
    stated, tensors = unpacked(by_hand())
    plan = read_kernel_file(packed({**stated, "driver": 12090}, tensors)).plan
    assert plan.obstacle((8, 7), 13010, 166912) == ""
    assert plan.obstacle((8, 6), 13010, 166912) == "it is for sm_87, this GPU is sm_86: export it for that one"
    older = "it needs a driver for CUDA 12.9 or newer, the one here is for 12.8: update it"
    assert plan.obstacle((8, 7), 12080, 166912) == older
    assert plan.obstacle((8, 7), 13010, 49151) == (
        "it needs 49152 bytes of shared memory per block, this GPU has 49151"
    )  # fmt: skip
    assert version(13010) == "13.1"


def test_batches_and_parameters() -> None:
    stated, tensors = unpacked(by_hand())
    plan = read_kernel_file(packed(stated, tensors)).plan
    assert plan.inputs[0].row_bytes == 4 * 64
    stated["inputs"][0].update(dtype="uint8", layout="NHWC", shape=[8, 8, 1])
    assert read_kernel_file(packed(stated, tensors)).plan.inputs[0].row_bytes == 64
    assert [plan.batch_for(count) for count in (1, 2, 3, 4, 20, 21)] == [1, 3, 3, 20, 20, None]
    assert parameter_bytes(["pointer", "i32", "i32"]) == 32
    assert parameter_bytes(["i32", "descriptor:2"]) == 64 + 128 + 8 + 16 + 16
    assert NAME.fullmatch(file_name("sm_87")) and not NAME.fullmatch("model.sm_87a.kernels")
