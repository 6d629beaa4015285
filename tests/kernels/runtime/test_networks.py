"""A whole network, lowered to a kernel engine, through both runtimes on a stand-in: no hazard, and the same bits.

By default a small network, on digits in batches of 1 and 2; with TEST_TIMES above 1 the resnet20 of this repository, on
16 digits in batches of 1, 3, 8 and 4.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import Batch, fuse
from export.base.precision import PRECISIONS
from export.lowering.kernel_engine import lower_kernels
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import TracedOnnxRunner
from kernels.configs.targets import TARGETS
from resnet.data.labelled import LabelledInputs
from resnet.data.sources import open_test
from resnet.model_card import read_model_card
from resnet.models import create_model
from resnet.weights import load_weights
from tests.cuda_stand_in.stand_in import ROOT, Code
from tests.effort import TIMES
from tests.kernels.runtime.running import Cpp, Place

DIGITS = ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors"
COUNTS = (1, 3, 8, 4) if TIMES > 1 else (1, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture(scope="module")
def network(trained_digits: tuple[nn.Module, Tensor]) -> tuple[nn.Module, NDArray]:
    """What is run, and digits that it was not trained on."""
    if TIMES == 1:
        return trained_digits[0], trained_digits[1].numpy()[: sum(COUNTS)]
    card = read_model_card(DIGITS)
    assert card is not None
    model = create_model(card.model, num_classes=len(card.classes), in_channels=card.preprocessing.channels)
    load_weights(model, DIGITS)
    digits = LabelledInputs(open_test("digits", {card.data}), card.preprocessing)
    return model.eval(), digits.pictures.inputs(range(sum(COUNTS)), card.preprocessing)


@pytest.mark.parametrize(("target", "precision"), [("sm_87", "fp16"), ("sm_90", "bf16")])
def test_a_network_runs_in_python_and_in_cpp(
    target: str, precision: str, place: Place, cpp: Cpp, network: tuple[nn.Module, NDArray], tmp_path: Path
) -> None:
    """The classes are those of the ONNX file."""
    model, digits = network
    batch, p = Batch(1, max(COUNTS), max(COUNTS)), PRECISIONS[precision]
    program = fuse(model, torch.from_numpy(digits[:1]), batch)
    engine = lower_kernels(program, p, TARGETS[target], batch)
    place.code = [Code(code.cubin, TARGETS[target].capability, code.ptx) for code in engine.codes.values()]
    (path := tmp_path / engine.name).write_bytes(engine.content)
    with place.device(target) as device:
        found, wrong = place.python(device, path, *COUNTS, given=digits)
        assert (wrong, device.defects, device.left) == ("", [], 0)
        same, wrong = cpp.run(device, path, *COUNTS, given=digits)
    assert (wrong, device.defects, device.left) == ("", [], 0)
    assert same.tobytes() == found.tobytes()
    with TracedOnnxRunner(lower_onnx(program, p, {}), p) as runner:
        (expected,) = runner.infer({"input": digits}).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.abs(expected).max())
    assert (found.argmax(1) == expected.argmax(1)).all()
