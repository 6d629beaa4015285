"""A whole network, lowered to a kernel engine, through both runtimes on a stand-in: no hazard, and the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import Batch
from export.base.precision import PRECISIONS
from export.lowering.kernel_engine import lower_kernels
from kernels.configs.targets import TARGETS
from tests.cuda_stand_in.stand_in import Code
from tests.export.digits import fused
from tests.kernels.runtime.running import Cpp, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("stand-in"))


@pytest.mark.parametrize(("target", "precision"), [("sm_87", "fp16"), ("sm_90", "bf16")])
def test_a_network_runs_in_python_and_in_cpp(
    target: str, precision: str, place: Place, cpp: Cpp, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    """Digits that a network was trained on, in batches of 1 and 2."""
    (model, digits), batch = trained_digits, Batch(1, 2, 2)
    engine = lower_kernels(fused(model, batch), PRECISIONS[precision], TARGETS[target], batch)
    place.code = [Code(code.cubin, TARGETS[target].capability, code.ptx) for code in engine.codes.values()]
    (path := tmp_path / engine.name).write_bytes(engine.content)
    given = digits[:3].numpy()
    with place.device(target) as device:
        found, wrong = place.python(device, path, 1, 2, given=given)
        assert (wrong, device.defects, device.left) == ("", [], 0)
        same, wrong = cpp.run(device, path, 1, 2, given=given)
    assert (wrong, device.defects, device.left) == ("", [], 0)
    assert same.tobytes() == found.tobytes()
    with torch.no_grad():
        expected = model(digits[:3]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.abs(expected).max())
    assert (found.argmax(1) == expected.argmax(1)).all()
