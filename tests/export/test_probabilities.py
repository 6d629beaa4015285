"""A softmax behind the scores: in every form, judged like the rest, and not applied twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def test_probabilities_and_the_same_answers(trained_digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, inputs = trained_digits
    hooks, labelled = dict(model._forward_hooks), digits.held_out()
    settings: dict[str, Any] = {"precision": "fp32", "labelled": labelled, "outputs": "probabilities"}
    result = digits.export(model, inputs[:16], tmp_path / "p", kernels=("sm_87",), **settings)
    assert result and result.skipped == {"sm_87 kernel": "no kernel computes softmax (softmax)"}
    assert {rung.name for rung in result.report.rungs} == {"eager", "folded", "fused", "onnx"}
    assert dict(model._forward_hooks) == hooks and not torch.allclose(model(inputs[:4]).sum(1), torch.ones(4))
    bundle = open_bundle(result.output)
    assert bundle.kinds == {"output": OutputKind("scores", "as told", softmax=True)}
    with running_first(bundle) as (_, infer), torch.no_grad():
        expected = model(inputs[:8]).double().softmax(1)
        np.testing.assert_allclose(infer(inputs[:8].numpy())["output"], expected, atol=1e-6)
    labelled.pictures.picture(3).save(tmp_path / "4.png")
    plain = digits.write(digits.fused(model), tmp_path / "plain")
    once, also = (
        [found["probability"] for found in json.loads(run_here("classify", at, tmp_path / "4.png", "--json").stdout)
         ["images"][0]["predictions"]]
        for at in (result.output, plain)
    )  # fmt: skip
    np.testing.assert_allclose(once, also, atol=1e-6)


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
