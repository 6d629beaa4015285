"""Large pictures: fewer at once, and fewer of them for the operators, but of those every value."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.base import batch
from export.base.batch import Arrays, Batch, at_once
from export.base.precision import PRECISIONS
from export.criteria import operators
from export.criteria.operators import check_operators
from export.criteria.references import run_references
from export.lowering.runners import EagerRunner, ProgramRunner
from export.runtime.parity import ladder
from export.runtime.parity.checks import OperatorCheck
from export.runtime.parity.ladder import execute, operator_inputs
from tests.export.criteria import mutants
from tests.export.networks import BATCH, Fused

FP16 = PRECISIONS["fp16"]


@pytest.mark.parametrize(
    ("size", "run", "shown"),
    [((32, 32), 392, 4), ((224, 224), 8, 4), ((512, 512), 2, 4), ((512, 1024), 2, 2), ((4000, 3000), 2, 1)],
)
def test_how_many_pictures_are_computed_on_together(size: tuple[int, int], run: int, shown: int) -> None:
    inputs: dict[str, NDArray] = {"input": np.broadcast_to(np.float32(0), (16, 1, *size))}
    assert at_once(inputs) == at_once({"input": np.broadcast_to(np.uint8(0), (16, *size, 3))}) == run
    with patch("export.base.batch.np.resize", lambda x, shape: np.broadcast_to(np.float32(0), shape)):
        assert len(operator_inputs(inputs, Batch(1, 8, 32))["input"]) == shown
        assert len(operator_inputs(inputs, Batch(8, 8, 8))["input"]) == 8  # it takes no fewer


class Counting(ProgramRunner):
    """Remembers its batches."""

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        self.sizes = [*getattr(self, "sizes", []), len(inputs["input"])]
        return super().infer(inputs)


def test_large_pictures_run_few_at_once_and_a_wrong_corner_is_refused(
    fused: Mapping[str, Fused], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = fused["basic"]
    images = subject.images.numpy()
    monkeypatch.setattr(batch, "_PIXELS_AT_ONCE", 2 * images[0, 0].size)
    monkeypatch.setattr(ladder, "_OPERATOR_PIXELS", images[0, 0].size)
    runner = Counting(subject.program, FP16, ("output",))
    execution = execute(runner, {"input": images}, BATCH)
    assert max(runner.sizes) == 2 and sum(runner.sizes) >= 1.5 * len(images)
    assert len(execution.straight["output"]) == len(images) and {len(x) for x in execution.trace.values()} == {1}
    assert check_operators(subject.program, FP16, execution.trace)
    for operator in (mutants.CONV, mutants.STEM):
        wrong = mutants.MUTANTS[operator]["one corner pixel wrong"]
        if any(node.target is operator for node in subject.program.master.graph.nodes):
            broken = ProgramRunner(subject.program, FP16, ("output",), operators=wrong.operators(subject.program))
            assert not check_operators(subject.program, FP16, execute(broken, {"input": images}, BATCH).trace)
    with patch.object(EagerRunner, "_run", autospec=True, side_effect=EagerRunner._run) as run:
        references = run_references(subject.model, subject.program, ("output",), {"input": images}, FP16)
    assert {len(call.args[1]["input"]) for call in run.call_args_list} == {2}
    assert torch.tensor(references.oracle["output"]).shape[0] == len(images)


@pytest.mark.parametrize("name", ["digits", "basic", "resnet8"])
def test_figures_are_those_of_all_images_together_and_the_last_image_counts(
    fused: Mapping[str, Fused], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    subject, images = fused[name], {"input": fused[name].images.numpy()}
    trace = execute(ProgramRunner(subject.program, FP16, ("output",)), images, BATCH).trace
    monkeypatch.setattr(operators, "_TILE", 1)
    by_image = check_operators(subject.program, FP16, trace)
    last = {node: value.clone() for node, value in trace.items()}
    victim = next(n.name for n in subject.program.master.graph.nodes if n.target is mutants.CONV)
    last[victim][-1, :, -1, -1] += 1
    refused = check_operators(subject.program, FP16, last).first_failure
    assert refused is not None and refused.fault is not None and refused.fault.index[0] == len(last[victim]) - 1
    monkeypatch.setattr(operators, "_passed", lambda *arguments: None)
    together = check_operators(subject.program, FP16, trace)
    assert by_image and together and by_image.unchecked == together.unchecked
    for one, other in zip(by_image.checks, together.checks, strict=True):
        assert isinstance(one, OperatorCheck) and isinstance(other, OperatorCheck)
        figures = (one.rms_z, one.max_z, one.rms_limit, one.max_limit)
        assert figures == pytest.approx((other.rms_z, other.max_z, other.rms_limit, other.max_limit), rel=1e-4)


def test_what_a_check_computed_is_freed_when_it_ends(fused: Mapping[str, Fused]) -> None:
    """Nothing waits for the garbage collector, which counts objects and not their size."""
    subject = fused["basic"]
    images = {"input": subject.images.numpy()}
    trace = execute(ProgramRunner(subject.program, FP16, ("output",)), images, BATCH).trace
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        assert check_operators(subject.program, FP16, trace)
        gc.collect()
        assert not [x for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
