"""A softmax behind the scores: in every form, judged like the rest, and not applied twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import ExportError, open_bundle
from export.runtime.artefacts import running_first
from export.runtime.parity.network import OutputKind
from tests.export import digits
from tests.export.networks import Called
from tests.scripts.loading import run_here

pytestmark = pytest.mark.usefixtures("captured_once")


def test_probabilities_and_the_same_answers(trained_digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, inputs = trained_digits
    hooks = dict(model._forward_hooks)
    result = digits.export(model, inputs[:16], tmp_path / "p", precision="fp32", outputs="probabilities")
    assert result and {rung.name for rung in result.report.rungs} == {"eager", "folded", "fused", "onnx"}
    assert dict(model._forward_hooks) == hooks and not torch.allclose(model(inputs[:4]).sum(1), torch.ones(4))
    bundle = open_bundle(result.output)
    assert bundle.kinds == {"output": OutputKind("scores", "as told", softmax=True)}
    with running_first(bundle) as (_, infer), torch.no_grad():
        expected = model(inputs[:8]).double().softmax(1)
        np.testing.assert_allclose(infer(inputs[:8].numpy())["output"], expected, atol=1e-6)
    picture = digits.held_out().pictures.picture(3)
    picture.save(tmp_path / "4.png")
    (image,) = json.loads(run_here("classify", result.output, tmp_path / "4.png", "--json").stdout)["images"]
    with torch.no_grad():
        row = model(torch.from_numpy(digits.PREPROCESSING([picture]))).double().softmax(1)[0].sort(descending=True)[0]
    np.testing.assert_allclose([found["probability"] for found in image["predictions"]], row[:5], atol=1e-6)


# what is exported, and what is said
REFUSED = {
    "a softmax already": (lambda x, m: m.fc(x.flatten(1)).softmax(1), "returns probabilities already, a softmax"),
    "maps": (lambda x, m: x * m.fc.bias[0], r"expected a model that returns \[N, classes\], got of shape \[.*16, 16\]"),
    "several": (lambda x, m: (m.fc(x.flatten(1)), x), r"returns \[N, classes\], got a tuple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_scores_alone_is_refused(case: str, tmp_path: Path) -> None:
    forward, message = REFUSED[case]
    model = Called(forward, fc=nn.Linear(256, 10)).eval()
    with pytest.raises(ExportError, match=message):
        digits.export(model, torch.rand(8, 1, 16, 16), tmp_path / "b", outputs="probabilities")
    assert not (tmp_path / "b").exists()
