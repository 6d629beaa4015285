"""The emulator sees what it is for: right code broken in one place is refused, and for the reason that it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.configs.config import KernelLaunch
from kernels.configs.targets import TARGETS
from kernels.emulator.block import UnknownInstruction
from kernels.emulator.values import decode, encode, width
from kernels.oracle import make_inputs, p1_failures
from kernels.plan import plan
from tests.effort import TIMES
from tests.emulator.compiling import Compiler
from tests.emulator.running import emulate
from tests.kernels.families import device_of, family

Edit = Callable[[str], str]


def edited(pattern: str, to: str, which: int = 0) -> Edit:
    """Replaces one match of a pattern, counted from 0, and from the end if negative."""

    def edit(text: str) -> str:
        match = [*re.finditer(pattern, text)][which]
        return text[: match.start()] + match.expand(to) + text[match.end() :]

    return edit


def removed(pattern: str, which: int = 0) -> Edit:
    return edited(pattern, "", which)


def without(start: int, end: int) -> Edit:
    return lambda text: text[:start] + text[end:]


def without_barrier_before_arrival(text: str) -> str:
    """None between a partial sum's last store and the atomic that counts it."""
    last = r"st\.global(?:(?!atom\.|st\.global)[\s\S])*atom\."
    return re.sub(last, lambda match: re.sub(BARRIER, "", match[0]), text, count=1)


BARRIER, FENCE = r"bar\.sync\s+0;", r"fence\.proxy\.async\.shared::cta;"
MBARRIER_WAIT = r"mbarrier\.try_wait[^;]*;(\s*\.loc[^\n]*\n)?\s*@!complete bra\.uni waitLoop;"
ATOMIC = r"atom\.global\.gpu\.acq_rel"
# What is broken, in which family's code for which target, how, and what is seen: a part of a defect or of P1's words.
PLANTED: dict[str, tuple[str, str, Edit, str]] = {
    "barrier in the loop": ("gathered", "sm_87", removed(BARRIER), "race: "),
    "barrier of the epilogue": ("gathered", "sm_87", removed(BARRIER, -1), "race: "),
    "wait for a copy": (
        "gathered", "sm_87", edited(r"cp\.async\.wait_group\s+[1-9]", "cp.async.wait_group 9"), "under an async copy",
    ),
    "commit of a copy": ("gathered", "sm_87", removed(r"cp\.async\.commit_group;", -1), "under an async copy"),
    "mask of a copy": ("gathered", "sm_87", edited(r"(cp\.async\.c[ag][^;]*0x\w+), %r\d+;", r"\1;"), "z is"),
    "mask of a store": ("gathered", "sm_87", edited(r"@%p\d+ (st\.global)", r"\1"), "out of bounds"),
    "mask of a load": ("gathered", "sm_87", edited(r"@%p\d+ (ld\.global)", r"\1", -1), "out of bounds"),
    "comparison": ("gathered", "sm_87", edited(r"setp\.lt\.s32", "setp.ge.s32"), "out of bounds"),
    "place of a shared store": (
        "gathered", "sm_87", edited(r"(st\.shared\.v4\.b32\s*\[%r\d+)(\+\d+)?\]", r"\1+8]"), "misaligned",
    ),
    "order of an atomic": ("gathered-split", "sm_87", edited(ATOMIC, "atom.global.gpu.relaxed"), "another block wrote"),
    "scope of an atomic": ("gathered-split", "sm_90", edited(ATOMIC, "atom.global.cta.acq_rel"), "another block wrote"),
    "barrier before the arrival": ("gathered-split", "sm_87", without_barrier_before_arrival, "another block wrote"),
    "fence before wgmma": ("gathered", "sm_90", removed(FENCE), "no fence.proxy.async"),
    "fence of registers": ("gathered", "sm_90", removed(r"wgmma\.fence\.sync\.aligned;"), "since the last wgmma.fence"),
    "fence before a TMA load": ("boxes-persistent", "sm_90", removed(FENCE, -1), "no fence.proxy.async"),
    "wait for a TMA load": ("boxes", "sm_90", removed(MBARRIER_WAIT), "under"),
    "bytes of a TMA load": (
        "boxes", "sm_120", edited(r"(expect_tx\.shared::cta\.b64 _, \[%r\d+\], )\d+", r"\g<1>64"), "deadlock",
    ),
    "start of an mbarrier": ("boxes", "sm_120", removed(r"@%p\d+ mbarrier\.init[^;]*;"), "not initialised"),
    "wait for a wgmma": (
        "boxes", "sm_90", edited(r"(wgmma\.wait_group\.sync\.aligned)\s+0", r"\1 1", -1), "wgmma",
    ),
    "wait for the previous kernel": ("bottleneck", "sm_90", removed(r"griddepcontrol\.wait ;"), "griddepcontrol.wait"),
    "release of the next": (
        "bottleneck", "sm_120", removed(r"griddepcontrol\.launch_dependents ;"), "never releases the next",
    ),
}  # fmt: skip


def launch_of(name: str, target: str) -> KernelLaunch:
    found = family(name, torch.float16, device_of(name, target))
    assert found is not None
    (launch,) = plan(*found, device_of(name, target))
    return launch


def shown(launch: KernelLaunch, target: str, compiler: Compiler, edit: Edit = str) -> list[str]:
    """What is seen to be wrong."""
    inputs = make_inputs(launch.problem)
    found = emulate([launch], TARGETS[target], inputs, compiler, edit=edit)
    return [*found.defects, *p1_failures(found.y, launch.problem, inputs)]


@pytest.mark.parametrize("what", PLANTED)
def test_broken_code_is_refused(what: str, compiler: Compiler) -> None:
    name, target, edit, expected = PLANTED[what]
    found = shown(launch_of(name, target), target, compiler, edit)
    assert any(expected in line for line in found), found


STATEMENT = re.compile(r"^\t(?:@!?%p\d+ )?([a-z][\w.:]*)[^\n;]*;", re.MULTILINE)
# What a load leaves where it is masked, of a bias in columns that nobody stores; an mbarrier that nobody uses again.
HARMLESS = {"mov.b16", "mov.u16", "mbarrier.inval.shared::cta.b64"}
# With more effort, of several.
SWEPT = [("head", "sm_90"), ("gathered", "sm_87"), ("gathered-split", "sm_120"), ("boxes-persistent", "sm_90")]


@pytest.mark.parametrize(("name", "target"), SWEPT[: 1 if TIMES == 1 else None])
def test_no_kind_of_statement_can_be_left_out(name: str, target: str, compiler: Compiler) -> None:
    """Each opcode of a kernel is refused where it is missing at its first, middle or last place."""
    launch, places = launch_of(name, target), defaultdict(list)
    for match in STATEMENT.finditer(compiler(launch, TARGETS[target]).ptx):
        places[match[1]].append(match.span())
    unseen = set()
    for op, spans in places.items():
        for start, end in dict.fromkeys((spans[0], spans[len(spans) // 2], spans[-1])):
            if shown(launch, target, compiler, without(start, end)):
                break
        else:
            unseen.add(op)
    assert unseen <= HARMLESS


@pytest.mark.parametrize(
    "change", [{"W": 8}, {"H": 7}, {"STRIDE_W": 2}, {"DILATION_H": 2}, {"PAD_W": 0}, {"C_OUT": 39}], ids=repr
)
def test_a_wrong_stride_tap_or_size_is_refused(change: dict[str, int], compiler: Compiler) -> None:
    """As if the launch or the kernel's arithmetic had it wrong."""
    launch = launch_of("gathered", "sm_87")
    assert launch.scalars.keys() >= change.keys()
    assert shown(replace(launch, scalars={**launch.scalars, **change}), "sm_87", compiler)


def test_an_unknown_instruction_is_named_before_anything_runs(compiler: Compiler) -> None:
    unknown = edited(r"\n\s*ret;", "\ntcgen05.alloc.sync %r1;\nld.global.surprise.b32 %r1, [%rd1];\nret;")
    with pytest.raises(UnknownInstruction, match=r"tcgen05\.alloc\.sync and 1 more"):
        shown(launch_of("gathered", "sm_87"), "sm_87", compiler, unknown)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_floats_are_those_of_torch(kind: str) -> None:
    """Of every bit pattern, and of float32 between them."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    bits = np.arange(2**16, dtype=np.uint16)
    values = decode(bits, kind)
    theirs = torch.from_numpy(bits.copy()).view(dtype).float().numpy()
    assert width(kind) == 2 and np.array_equal(values, theirs, equal_nan=True)
    between = (np.random.default_rng(0).standard_normal(2**16) * 2.0**-10).astype(np.float32)
    rounded = torch.from_numpy(between).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(encode(between, kind), rounded)
