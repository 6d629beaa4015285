"""A block followed through a few instructions written by hand; compiled kernels are in test_compile.py."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.prediction.block import L2_LATENCY, Block, Trace
from kernels.prediction.sass import parse
from kernels.prediction.words import predicate_logic, wavefronts


def sass(*lines: str, control: int = 0x000FE200) -> str:
    """As nvdisasm prints it: a stall of one cycle each, no scoreboards; `NAME:` is a label."""
    text = []
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*0000*/    {line} ;   /* 0x0000000000000000 */\n    /* 0x{control:08x}00000000 */")
    return "\n".join([*text, "        /*0000*/    EXIT ;   /* 0x0000000000000000 */", "    /* 0x000fea0000000000 */"])


def trace(*lines: str, constants: dict[int, int] | None = None, arrival: int = 0, control: int = 0x000FE200) -> Trace:
    code = parse(sass(*lines, control=control))
    return Block(code, 64, (5, 0, 0), constants or {}, arrival, lambda name: 512.0).run()


LOOP = (
    "MOV R0, c[0x0][0x160]", ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "IADD3 R0, R0, -0x1, RZ",
    "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA `(.L_x_0)",
)  # fmt: skip


def test_a_loop_runs_as_often_as_its_counter_says() -> None:
    found = trace(*LOOP, constants={0x160: 7})
    assert found.issued["HMMA.16816.F32"] == 7 and found.instructions == 1 + 4 * 7 + 1
    assert found.matrix_flops == 7 * 2 * 16 * 8 * 16
    assert (found.loop_instructions, found.loop_flops) == (4 * 7, found.matrix_flops), "the loop alone"
    assert found.matrix_cycles == 7 * 8 <= found.cycles


def test_a_loop_of_64_bits_runs_as_often_as_its_counter_says() -> None:
    """As for sm_120: once at least, whatever its end."""
    way = (
        "MOV R1, RZ",
        "MOV R3, RZ",
        "MOV R2, c[0x0][0x160]",
        "IMNMX.U64 PT, PT, R4, R2, 0x2, !PT, !PT",
        "MOV R7, 0x7",
        "SEL.64 R6, RZ, 0x9, PT",
    )
    loop = (".L_x_0:", "IADD.64 R6, R6, 0x1", "ISETP.NE.U64.AND P0, PT, R6, R4, PT", "@P0 BRA `(.L_x_0)")
    traces = [trace(*way, *loop, constants={0x160: n}) for n in (0, 2, 5)]
    assert [found.issued["IADD.64"] for found in traces] == [2, 2, 5]
    assert not any(found.loop_instructions for found in traces), "it multiplies nothing"


def test_a_loop_counter_that_begins_as_two_halves_is_known() -> None:
    way = ("HFMA2.MMA R0, -RZ, RZ, 0, 1.78813934326171875e-07", *LOOP[1:])
    assert trace(*way).issued["HMMA.16816.F32"] == 3


@pytest.mark.parametrize(
    ("first", "message"),
    [("LDG.E R0, [R2.64]", "goes back on what is not known"), ("MOV R0, 0x7fffffff", "not ended after")],
    ids=["unknown", "endless"],
)
def test_a_loop_that_cannot_be_followed_is_said(first: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.prediction.block.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(ValueError, match=message):
        trace(first, *LOOP[1:])


def test_the_last_to_arrive_takes_its_own_way() -> None:
    """What one thread finds in memory reaches the others through shared memory."""
    way = (
        "S2R R3, SR_TID.X", "ISETP.EQ.AND P1, PT, R3, RZ, PT", "@P1 ATOMG.E.ADD.STRONG.GPU PT, R5, [R8.64], R9",
        "@P1 STS [RZ], R5", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDS R6, [RZ]", "ISETP.NE.U32.AND P0, PT, R6, 0x3, PT",
        "@P0 BRA `(.L_x_1)", "FADD R1, R1, R2", ".L_x_1:",
    )  # fmt: skip
    assert [trace(*way, arrival=arrival).issued["FADD"] for arrival in (0, 3)] == [0, 1]


def test_the_way_of_the_warp_that_multiplies_is_followed() -> None:
    """As for sm_110: the first of two warps, in the half that a branch goes to."""
    way = (
        "S2R R3, SR_TID.X", "ISETP.LT.U32.AND P0, PT, R3, 0x20, PT", "@P0 BRA `(.L_x_0)", "FADD R1, R1, R2",
        "BRA `(.L_x_1)", ".L_x_0:", "{}", ".L_x_1:",
    )  # fmt: skip
    issued = [trace(*(line.format(last) for line in way)).issued for last in (LOOP[2], "MOV R4, RZ")]
    assert issued[0]["HMMA.16816.F32"] == 1 and issued[1]["FADD"] == 1


ADDRESS = ("S2R R0, SR_TID.X", "MOV R8, RZ", "MOV R9, 0x1", "IMAD.WIDE.U32 R2, R0, {step}, R8")


@pytest.mark.parametrize(("step", "sectors"), [("0x4", 8), ("0x20", 64), ("0x0", 2), ("0x10", 32)])
def test_sectors_are_counted_once_for_each_warp(step: str, sectors: int) -> None:
    """Two warps; what is loaded through L1 is there the second time."""
    lines = [line.format(step=step) for line in ADDRESS]
    copy = "LDGSTS.E.BYPASS.128 [R0], [R2.64]" if step == "0x10" else "STG.E [R2.64], R7"
    found = trace(*lines, copy)
    assert found.load_sectors + found.store_sectors == sectors
    twice = trace(*lines, "LDG.E R5, [R2.64]", "LDG.E R6, [R2.64]")
    assert twice.load_sectors == (1 if step == "0x0" else sectors)
    masked = trace(*lines, "ISETP.LT.AND P0, PT, R0, 0x8, PT", "@P0 STG.E [R2.64], R7")
    assert masked.store_sectors == {"0x4": 1, "0x20": 8, "0x0": 1, "0x10": 4}[step]


def test_a_warp_waits_for_what_it_loads() -> None:
    """Scoreboard 0 is set by the load and waited for by the addition."""
    sets, waits = 0x000E2200, 0x001FE200
    load = sass("LDG.E R5, [R2.64]", control=sets).split("        /*0000*/    EXIT")[0]
    code = parse(load + sass("FADD R6, R5, R5", control=waits))
    assert Block(code, 32, (0, 0, 0), {}, 0, lambda name: 512.0).run().cycles >= L2_LATENCY


def test_banks() -> None:
    """Words of one row, of one bank, of 16 bytes side by side, and one word for all."""
    lanes, everyone = np.arange(32)[None, :], np.ones((1, 32), bool)
    strides = {4: 1, 128: 32, 8: 2, 0: 1}
    assert {stride: wavefronts(lanes * stride, everyone, 4) for stride in strides} == strides
    quarters = (np.arange(32) * 16).reshape(4, 8)
    assert wavefronts(quarters, np.ones((4, 8), bool), 16) == 4
    assert wavefronts(lanes * 128, np.zeros((1, 32), bool), 4) == 0


def test_what_is_not_known_matters_only_where_it_is_asked_for() -> None:
    known = np.array([True, False])
    assert predicate_logic(0xC0, [None, False, True]) is False  # a and b
    assert predicate_logic(0xC0, [None, True, True]) is None
    assert predicate_logic(0xAA, [None, None, known]).tolist() == [True, False]  # c
