"""Networks that 16 bits do not suit: what fails is named, and the fewest layers are kept in float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import ExportConfig, ExportError, ExportResult, export_bundle, fuse, verify_bundle
from export.base.precision import PRECISIONS
from export.criteria.references import run_references
from export.runtime.parity.ladder import reference_rungs
from export.runtime.parity.rungs import Rung
from export.terminal.flags import in_flags
from tests.export import digits
from tests.export.networks import BATCH, Called

BLOCK = "layer1.0"


def scaled(model: nn.Module, block: str, factor: float) -> nn.Module:
    """The same function, with what lies between a block's two convolutions `factor` times as large."""
    changed: Any = copy.deepcopy(model)
    block_module = changed.get_submodule(block)
    with torch.no_grad():
        block_module.bn1.weight.mul_(factor)
        block_module.bn1.bias.mul_(factor)
        block_module.conv2.weight.div_(factor)
    return changed


def export(
    model: nn.Module,
    images: Tensor,
    output: Path,
    precision: str,
    kept: tuple[str, ...] | str = (),
    engine: str = "none",
) -> ExportResult:
    config = ExportConfig(precision, BATCH, engine, keep_fp32=kept)
    return export_bundle(model, digits.EXAMPLE, output, config, images=images, metadata=digits.METADATA)


def rungs_of(result: ExportResult) -> dict[str, Rung]:
    return {rung.name: rung for rung in result.report.rungs}


@pytest.fixture(scope="module")
def overflowing(trained_digits: tuple[nn.Module, Tensor]) -> nn.Module:
    return scaled(trained_digits[0], BLOCK, 1.5e4)


def test_an_overflow_is_named_with_its_layer_and_both_values(
    overflowing: nn.Module, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    result = export(overflowing, trained_digits[1], tmp_path / "b", "fp16")
    assert not result and list(tmp_path.iterdir()) == []
    rungs = rungs_of(result)
    for name in ("fused", "onnx"):
        operators = rungs[name].operators
        assert operators is not None and operators.first_failure is not None
        fault = operators.first_failure.fault
        assert operators.first_failure.name == f"{BLOCK}.conv1" and fault is not None
        assert fault.kind == "overflow" and fault.got == float("inf") and fault.expected > 65504
    assert rungs["fused"].verdict == f"{BLOCK}.conv1: overflow"
    start = f"not equal to the eager model: fused: {BLOCK}.conv1 (conv2d_bias_act): overflow at ["
    assert result.report.verdict.startswith(start)
    assert in_flags(result.report.verdict).endswith("; --keep-fp32 auto finds the layers to leave in fp32")
    recorded = next(rung for rung in result.report.to_json()["rungs"] if rung["name"] == "fused")
    broken = next(check for check in recorded["operators"]["checked"] if check["reason"])
    assert broken["name"] == f"{BLOCK}.conv1" and broken["fault"]["kind"] == "overflow"


# how much larger -> what float16 cannot do there
FACTORS = {"overflow": 1.5e4, "underflow": 1e-6}


@pytest.mark.parametrize("case", FACTORS)
def test_the_fewest_layers_are_kept(case: str, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    """The one that overflows (or flushes to zero), and the one that reads it: what lies between is float32."""
    model = scaled(trained_digits[0], BLOCK, FACTORS[case])
    result = export(model, trained_digits[1], tmp_path / "b", "fp16", "auto")
    assert result, result.report.verdict
    assert result.report.kept == (f"{BLOCK}.conv1", f"{BLOCK}.conv2")
    assert [rung.name for rung in result.report.rungs] == ["unfused", "folded", "fused", "onnx"]
    weights = {t.name: t.data_type for t in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    single = {name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT}
    assert single == {f"{BLOCK}.{part}" for part in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")}
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["kept"] == [f"{BLOCK}.conv1", f"{BLOCK}.conv2"]
    assert all(verify_bundle(tmp_path / "b"))


def test_what_needs_nothing_keeps_nothing(trained_digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    result = export(*trained_digits, tmp_path / "b", "fp16", "auto")
    assert result and result.report.kept == () and result.report.rungs[0].name == "eager"


def test_a_block_is_kept_by_its_name_and_the_engine_is_proved_to_keep_it(
    overflowing: nn.Module, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    result = export(overflowing, trained_digits[1], tmp_path / "b", "fp16", (BLOCK,), "tensorrt-rtx")
    assert result and result.report.kept == (f"{BLOCK}.conv1", f"{BLOCK}.conv2")
    layers = json.loads((tmp_path / "b" / "model.rtx.layers.json").read_text())
    types = {layer["name"]: layer["outputs"][0] for layer in layers if layer["type"] == "CONVOLUTION"}
    assert {name for name, kind in types.items() if kind == "FLOAT"} == set(result.report.kept)
    assert set(types.values()) == {"FLOAT", "HALF"}


def test_one_of_the_two_is_not_enough(
    overflowing: nn.Module, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    """What the first computes in float32 is rounded for the second, and overflows there."""
    result = export(overflowing, trained_digits[1], tmp_path / "b", "fp16", (f"{BLOCK}.conv1",))
    fused = next(rung for rung in result.report.rungs if rung.name == "fused")
    assert not result and fused.operators is not None and fused.operators.first_failure is not None
    assert fused.operators.first_failure.name == f"{BLOCK}.conv2"
    assert "in what it reads" in fused.operators.first_failure.reason


def test_bf16_has_the_range_and_keeps_by_name(
    overflowing: nn.Module, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    assert export(overflowing, trained_digits[1], tmp_path / "a", "bf16")
    result = export(overflowing, trained_digits[1], tmp_path / "b", "bf16", ("fc", "layer1"))
    assert result, result.report.verdict
    assert result.report.kept == ("fc", f"{BLOCK}.conv1", f"{BLOCK}.conv2")


def test_channels_that_training_switched_off_are_no_underflow(
    trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    """Published ResNets have BatchNorms with a gamma of 1e-8 and a bias of 1e-7: float16 holds neither, nor need it."""
    model: Any = copy.deepcopy(trained_digits[0])
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight[[1, 5, 9]] *= 1e-7
            norm.bias[[1, 5, 9]] = torch.tensor([3e-7, -4e-8, 2e-6])
    result = export(model, trained_digits[1], tmp_path / "b", "fp16")
    rungs = rungs_of(result)
    assert rungs["fused"] and rungs["onnx"], result.report.verdict


def hidden_underflow() -> nn.Module:
    """The second convolution lives on what half of the channels of the first hold: values that float16 flushes to 0."""
    torch.manual_seed(0)
    a, b, fc = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)
    with torch.no_grad():
        a.weight[8:] *= 1e-8
        a.get_parameter("bias")[8:] *= 1e-8
        b.weight[:, 8:] *= 5e5
    return Called(lambda x, m: m.fc(torch.relu(m.b(torch.relu(m.a(x)))).mean((2, 3))), a=a, b=b, fc=fc).eval()


NOISE = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_an_underflow_beside_values_of_usual_size_is_found_and_both_layers_are_kept(tmp_path: Path) -> None:
    for kept, names, verdict in (((), ("fused", "onnx"), "a: underflow"), (("a",), ("fused",), "b: underflow")):
        failed = export(hidden_underflow(), NOISE, tmp_path / "b", "fp16", kept)
        assert not failed and {rungs_of(failed)[name].verdict for name in names} == {verdict}
    both = export(hidden_underflow(), NOISE, tmp_path / "b", "fp16", ("a", "b"))
    assert all(both.report.rungs), both.report.verdict


def two_heads() -> nn.Module:
    """One head overflows before its BatchNorm; of the other, the folded weights can be changed."""
    torch.manual_seed(0)
    conv, norm, other = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        conv.weight.mul_(1e6)
        norm.get_buffer("running_var").fill_(1e12)
        other.get_buffer("1.running_mean").normal_()
    heads = Called(
        lambda x, m: {"a": m.norm(m.conv(x)).mean((2, 3)), "b": m.other(x).mean((2, 3))},
        conv=conv,
        norm=norm,
        other=other,
    )
    return heads.eval()


@pytest.mark.parametrize("wrong", [None, "norm", "other"])
def test_a_wrong_fold_is_not_hidden_by_an_overflow(wrong: str | None) -> None:
    """Neither in the output that overflows, where only float64 can tell, nor in another."""
    model, images = two_heads(), np.random.default_rng(0).normal(size=(4, 1, 16, 16)).astype(np.float32)
    program = fuse(model, digits.EXAMPLE, BATCH)
    start = {"norm": "conv_weight", "other": "other_0_weight"}.get(wrong or "", "none")
    for name, weight in program.folded.named_buffers():
        if name.startswith(start):
            weight.mul_(1.2)
    references = run_references(model, program, ("a", "b"), images, PRECISIONS["fp16"])
    rungs = {rung.name: rung for rung in reference_rungs(references, PRECISIONS["fp16"])}
    assert bool(rungs["eager"].not_run) is (wrong is None)
    assert all(rungs.values()) is (wrong is None)


@pytest.mark.parametrize("factor", [2e4, 1e6])
def test_an_eager_model_that_overflows_where_the_folded_one_does_not_is_no_reference(
    factor: float, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    """A variance, or also what a convolution hands to its BatchNorm, is beyond float16; folded it is within."""
    model: Any = copy.deepcopy(trained_digits[0])
    block = model.get_submodule(BLOCK)
    with torch.no_grad():
        block.conv1.weight.mul_(factor)
        block.bn1.running_mean.mul_(factor)
        block.bn1.running_var.mul_(factor**2)
    result = export(model, trained_digits[1], tmp_path / "b", "fp16")
    assert result, result.report.verdict
    eager, folded, fused, onnx_rung = result.report.rungs
    assert eager.name == "eager" and eager.verdict.startswith("no reference: the error of output in fp16 is ")
    assert folded.name == "folded" and folded.seconds > 0 and folded.worst is not None and folded.worst.ratio == 1
    assert fused and onnx_rung


def test_a_transposed_convolution_is_kept_and_proved_like_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Flatten(), nn.Linear(3136, 10)
    )
    for kept in ((), ("2",)):
        result = export(model.eval(), NOISE, tmp_path / "b", "fp16", kept, "tensorrt-rtx")
        assert all(result.report.rungs), result.report.verdict
        assert result.report.rungs[-1].name == "tensorrt-rtx" and result.report.kept == kept


REFUSED: dict[str, tuple[str, tuple[str, ...] | str, str]] = {
    "no such layer": ("fp16", ("layer2.1.conv9",), "no layer is called 'layer2.1.conv9'; expected a layer"),
    "all of them": ("fp16", ("conv1", "layer1", "layer2", "layer3", "fc"), "none is left: use --fp32"),
    "in float32": ("fp32", ("fc",), "--keep-fp32 is for --fp16 and --bf16, got --fp32"),
    "in int8": ("int8", "auto", "--keep-fp32 is for --fp16 and --bf16, got --int8"),
    "auto beside names": ("fp16", ("auto", "fc"), "--keep-fp32: expected auto or names, got both: auto fc"),
    "a string": ("fp16", "fc", "--keep-fp32: expected auto or a tuple of names, got 'fc'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused(case: str, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    precision, kept, message = REFUSED[case]
    with pytest.raises(ExportError) as caught:
        export(*trained_digits, tmp_path / "b", precision, kept)
    assert message in in_flags(str(caught.value)) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
