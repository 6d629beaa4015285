"""Networks that 16 bits do not suit: what fails is named, and the fewest layers are kept in float32."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import ExportError, ExportResult, fuse, verify_bundle
from export.base.precision import PRECISIONS
from export.criteria.references import run_references
from export.mixed_precision import chosen, fewest
from export.runtime.parity.ladder import reference_rungs
from export.runtime.parity.rungs import Rung
from export.terminal.flags import in_flags
from tests.export import digits
from tests.export.networks import BATCH, Called

pytestmark = pytest.mark.usefixtures("captured_once")

BLOCK = "layer1.0"


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """The same function, with what lies between a block's two convolutions `factor` times as large."""
    changed: Any = copy.deepcopy(model)
    block = changed.get_submodule(BLOCK)
    with torch.no_grad():
        block.bn1.weight.mul_(factor)
        block.bn1.bias.mul_(factor)
        block.conv2.weight.div_(factor)
    return changed


def rungs_of(result: ExportResult) -> dict[str, Rung]:
    return {rung.name: rung for rung in result.report.rungs}


Export = Callable[..., ExportResult]


@pytest.fixture
def reader(trained_digits: tuple[nn.Module, Tensor]) -> nn.Module:
    return copy.deepcopy(trained_digits[0])


@pytest.fixture
def overflowing(reader: nn.Module) -> nn.Module:
    return scaled(reader, 1.5e4)


@pytest.mark.parametrize("kept", [(), (f"{BLOCK}.conv1",)], ids=["none", "one of two"])
def test_an_overflow_is_named_with_its_layer_and_both_values(
    kept: tuple[str, ...], overflowing: nn.Module, export: Export, tmp_path: Path
) -> None:
    """What the first of two layers computes in float32 is rounded for the second, and overflows there."""
    result = export(model=overflowing, keep_fp32=kept)
    assert not result and list(tmp_path.iterdir()) == []
    layer = f"{BLOCK}.conv2" if kept else f"{BLOCK}.conv1"
    rungs = rungs_of(result)
    for name in ("fused",) if kept else ("fused", "onnx"):
        operators = rungs[name].operators
        assert operators is not None and operators.first_failure is not None
        fault = operators.first_failure.fault
        assert operators.first_failure.name == layer and fault is not None
        assert ("in what it reads" in operators.first_failure.reason) is bool(kept)
        assert fault.kind == "overflow" and fault.got == float("inf") and fault.expected > 65504
    assert rungs["fused"].verdict == f"{layer}: overflow"
    start = f"not equal to the eager model: fused: {layer} (conv2d_"
    assert result.report.verdict.startswith(start) and "): overflow at [" in result.report.verdict
    hint = "; --keep-fp32 auto finds the layers to leave in fp32"
    assert in_flags(result.report.verdict).endswith(hint) is (not kept)


@pytest.mark.parametrize("factor", [1.5e4, 1e-6], ids=["overflow", "underflow"])
def test_the_fewest_layers_are_kept(factor: float, reader: nn.Module, export: Export) -> None:
    """The one that overflows (or flushes to zero), and the one that reads it: what lies between is float32."""
    result = export(model=scaled(reader, factor), keep_fp32="auto")
    assert result, result.report.verdict
    assert result.report.kept == (f"{BLOCK}.conv1", f"{BLOCK}.conv2")
    assert [rung.name for rung in result.report.rungs] == ["unfused", "folded", "fused", "onnx"]
    weights = {t.name: t.data_type for t in onnx.load(result.output / "model.onnx").graph.initializer}
    single = {name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT}
    assert single == {f"{BLOCK}.{part}" for part in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")}
    assert json.loads((result.output / "manifest.json").read_text())["kept"] == [f"{BLOCK}.conv1", f"{BLOCK}.conv2"]
    assert all(verify_bundle(result.output))


def test_what_needs_nothing_keeps_nothing(export: Export) -> None:
    result = export(keep_fp32="auto")
    assert result and result.report.kept == () and result.report.rungs[0].name == "eager"


def test_a_block_is_kept_by_its_name_in_the_engine_too(overflowing: nn.Module, export: Export) -> None:
    result = export(model=overflowing, keep_fp32=(BLOCK,), engine="tensorrt-rtx")
    assert result and result.report.kept == (f"{BLOCK}.conv1", f"{BLOCK}.conv2")
    layers = json.loads((result.output / "model.rtx.layers.json").read_text())
    types = {layer["name"]: layer["outputs"][0] for layer in layers if layer["type"] == "CONVOLUTION"}
    assert {name for name, kind in types.items() if kind == "FLOAT"} == set(result.report.kept)
    assert set(types.values()) == {"FLOAT", "HALF"}


def test_bf16_has_the_range_and_keeps_by_name(overflowing: nn.Module, export: Export) -> None:
    assert export(model=overflowing, precision="bf16")
    result = export(model=overflowing, precision="bf16", keep_fp32=("fc", "layer1"))
    assert result, result.report.verdict
    assert result.report.kept == ("fc", f"{BLOCK}.conv1", f"{BLOCK}.conv2")


def test_channels_that_training_switched_off_are_no_underflow(reader: nn.Module, export: Export) -> None:
    """Published ResNets have BatchNorms with a gamma of 1e-8 and a bias of 1e-7: float16 holds neither, nor need it."""
    with torch.no_grad():
        for norm in (module for module in reader.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight[[1, 5, 9]] *= 1e-7
            norm.bias[[1, 5, 9]] = torch.tensor([3e-7, -4e-8, 2e-6])
    result = export(model=reader)
    assert rungs_of(result)["fused"] and rungs_of(result)["onnx"], result.report.verdict


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


def test_an_underflow_beside_values_of_usual_size_is_found_and_both_layers_are_kept(export: Export) -> None:
    export = partial(export, model=hidden_underflow(), images=NOISE)
    for kept, names, verdict in (((), ("fused", "onnx"), "a: underflow"), (("a",), ("fused",), "b: underflow")):
        failed = export(keep_fp32=kept)
        assert not failed and {rungs_of(failed)[name].verdict for name in names} == {verdict}
    both = export(keep_fp32=("a", "b"))
    assert all(both.report.rungs), both.report.verdict


def two_heads() -> nn.Module:
    """One head overflows before its BatchNorm; of the other, the folded weights can be changed."""
    torch.manual_seed(0)
    conv, norm, other = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        conv.weight.mul_(1e6)
        norm.get_buffer("running_var").fill_(1e12)
        other.get_buffer("1.running_mean").normal_()

    def call(x: Tensor, m: Any) -> dict[str, Tensor]:
        return {"a": m.norm(m.conv(x)).mean((2, 3)), "b": m.other(x).mean((2, 3))}

    return Called(call, conv=conv, norm=norm, other=other).eval()


@pytest.mark.parametrize("wrong", [None, "norm", "other"])
def test_a_wrong_fold_is_not_hidden_by_an_overflow(wrong: str | None) -> None:
    """Neither in the output that overflows, where only float64 can tell, nor in another."""
    model, images = two_heads(), np.random.default_rng(0).normal(size=(4, 1, 16, 16)).astype(np.float32)
    program = fuse(model, digits.EXAMPLE, BATCH)
    start = {"norm": "conv_weight", "other": "other_0_weight"}.get(wrong or "", "none")
    for name, weight in program.folded.named_buffers():
        if name.startswith(start):
            weight.mul_(1.2)
    references = run_references(model, program, ("a", "b"), {"input": images}, PRECISIONS["fp16"])
    rungs = {rung.name: rung for rung in reference_rungs(references, PRECISIONS["fp16"])}
    assert bool(rungs["eager"].not_run) is (wrong is None)
    assert all(rungs.values()) is (wrong is None)


@pytest.mark.parametrize("factor", [2e4, 1e6])
def test_an_eager_model_that_overflows_is_no_reference(factor: float, reader: nn.Module, export: Export) -> None:
    """A variance, or also what a convolution hands to its BatchNorm, is beyond float16; folded it is within."""
    block: Any = reader.get_submodule(BLOCK)
    with torch.no_grad():
        block.conv1.weight.mul_(factor)
        block.bn1.running_mean.mul_(factor)
        block.bn1.running_var.mul_(factor**2)
    result = export(model=reader)
    assert result, result.report.verdict
    eager, folded, fused, onnx_rung = result.report.rungs
    assert eager.name == "eager" and eager.verdict.startswith("no reference: the error of output in fp16 is ")
    assert folded.name == "folded" and folded.seconds > 0 and folded.worst is not None and folded.worst.ratio == 1
    assert fused and onnx_rung


def test_a_transposed_convolution_is_kept_and_proved_like_any_other(export: Export) -> None:
    torch.manual_seed(0)
    features = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2)
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(3136, 10)).eval()
    for kept in ((), ("2",)):
        result = export(model=model, images=NOISE, keep_fp32=kept, engine="tensorrt-rtx")
        assert all(result.report.rungs), result.report.verdict
        assert result.report.rungs[-1].name == "tensorrt-rtx" and result.report.kept == kept


NAMES = ("a", "b", "c", "d", "e", "f", "g")


def needing(*sets: str) -> Callable[[frozenset[str]], bool]:
    """Passes where all layers of one of the sets are kept."""
    return lambda kept: any(set(names) <= kept for names in sets)


def test_of_two_ways_the_costliest_layers_are_kept() -> None:
    assert fewest(NAMES, needing("a", "g")) == {"a"} and fewest(NAMES, needing("f", "bd")) == {"b", "d"}


def test_it_passes_and_each_member_is_needed() -> None:
    """For every single demand, and for every pair of demands of which one is enough."""
    for names in (NAMES[:size] for size in range(1, 6)):
        demands = ["".join(d) for k in range(1, len(names) + 1) for d in itertools.combinations(names, k)]
        for sets in [*((d,) for d in demands), *itertools.combinations(demands, 2)]:
            passes = needing(*sets)
            kept = fewest(names, passes)
            assert passes(kept) and not any(passes(kept - {name}) for name in kept)


def test_a_network_is_tried_few_times() -> None:
    """Each is a run over all labelled pictures: bisection, not every number of layers."""
    names = [str(i) for i in range(64)]
    tried: list[frozenset[str]] = []

    def passes(kept: frozenset[str]) -> bool:
        tried.append(kept)
        return {"0", "1"} <= kept

    assert fewest(names, passes) == {"0", "1"}
    assert len(tried) <= 1 + 6 + 1 and tried[0] == frozenset()


# operator -> the modules it computes
LAYERS = {
    "conv1": ("conv1", "bn1", "relu", "maxpool"),
    "layer1.0.conv1": ("layer1.0.conv1", "layer1.0.bn1"),
    "layer1.0.conv3": ("layer1.0.conv2", "layer1.0.conv3", "layer1.0.downsample.0"),
    "layer1.1.conv1": (),
    "layer10.0.conv1": (),
    "fc": ("avgpool", "fc"),
}
CHOICES: list[tuple[Collection[str], Collection[str]]] = [
    ((), ()),
    (("layer1.0.conv2",), ("layer1.0.conv3",)),  # a module that it is fused with
    (("layer1",), ("layer1.0.conv1", "layer1.0.conv3", "layer1.1.conv1")),
    (("conv1", "layer1.1", "conv1"), ("conv1", "layer1.1.conv1")),
]


def test_layers_are_chosen_by_name_or_by_what_they_are_part_of() -> None:
    for patterns, expected in CHOICES:
        assert chosen("ExportConfig.keep_fp32", LAYERS, patterns) == frozenset(expected)


@pytest.mark.parametrize("name", ["layer", "layer1.", "layer1.0.conv", "conv", "", "layer2", "0", "FC"])
def test_a_name_of_no_layer_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ExportError) as caught:
        chosen("ExportConfig.keep_fp32", LAYERS, ["fc", name])
    message = str(caught.value)
    assert message.startswith(f"ExportConfig.keep_fp32: no layer is called {name!r}; expected a layer")
    assert any(layer in message for layer in LAYERS) and "\n" not in message
