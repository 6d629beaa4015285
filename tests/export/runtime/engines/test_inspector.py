"""The engine inspector's JSON of TensorRT 10 and of 11: what is read, and engines that are not what was asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import pytest

from export import ExportError
from export.runtime.engines.inspector import prove_kernels, read_kernels

Layer = dict[str, Any]
WORDS = {
    "FLOAT": ("Row major linear FP32", "Float"),
    "HALF": ("Channel major FP16 format where channel % 8 == 0", "Half"),
    "BF16": ("Channel major BFloat16 format where channel % 8 == 0", "BFloat16"),
    "INT8": ("Thirty-two wide channel vectorized row major Int8 format.", "Int8"),
    None: ("N/A due to dynamic shapes", "N/A due to dynamic shapes"),
}
TACTIC = "sm80_xmma_fprop_implicit_gemm_{}_nhwckrsc_nhwc_tilesize128x64x32_stage4_warpsize2x2x1"


def tensor(name: str, kind: str | None, form: str) -> Layer:
    words, word = WORDS[kind]
    if form == "11":
        return {"Name": name, "Datatype": word, "Format": "Linear"}
    return {"Name": name, "Format/Datatype": words if form == "10 words" else word}


def kernel(form: str, layer: str, inputs: str | None, outputs: str | None, weights: str | None, **more: Any) -> Layer:
    """A convolution as TensorRT shows it; without `weights` they are not shown, as of a product in Myelin."""
    found: Layer = {
        "Name": f"{layer}.weight + {layer} + PWN({layer}.relu)",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("x", inputs, form)],
        "Outputs": [tensor("y", outputs, form)],
        "ParameterType": "Convolution",
        "TacticName": "",
        "Metadata": f"[ONNX Layer: {layer}]\x1e[ONNX Layer: {layer}.relu]",
    }
    if weights is not None:
        found["Weights"] = {"Type": WORDS[weights][1], "Count": 9}
    return {**found, **more}


def product(form: str, layer: str, inputs: str | None, outputs: str | None, tactic: str = "") -> Layer:
    more = {"LayerType": "gemm", "Name": f"{layer}_myl0_3", "ParameterType": "", "TacticName": tactic}
    return kernel(form, layer, inputs, outputs, None, **more)


def engine(form: str, kind: str) -> list[Layer]:
    """Two convolutions, one of them before an addition, and a product with a cast to float32 in it."""
    wide = "HALF" if kind == "INT8" else kind
    return [
        kernel(form, "stage1.conv1.input.q", "FLOAT", kind, None, LayerType="Reformat", ParameterType=""),
        kernel(form, "stage1.conv1", kind, kind, kind),
        kernel(form, "stage1.conv2", kind, wide, kind),
        product(form, "fc", kind, "FLOAT"),
    ]


def text(layers: list[Any]) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["input", "output"]})


TYPES = ("stage1.conv1", "stage1.conv2", "fc")
FORMS = ("10 words", "10", "11")
KINDS = ("FLOAT", "HALF", "BF16", "INT8")


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_is_of_its_own_type_alone(form: str) -> None:
    for kind in KINDS:
        kernels = read_kernels(text(engine(form, kind)))
        prove_kernels(kernels, dict.fromkeys(TYPES, kind))
        for other in {*KINDS} - {kind}:
            with pytest.raises(ExportError, match=f"computes in {kind}: expected {other}"):
                prove_kernels(kernels, dict.fromkeys(TYPES, other))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_of_a_kernel(form: str) -> None:
    kernels = read_kernels(text(engine(form, "INT8")))
    assert [k.product for k in kernels] == [False, True, True, True]
    assert kernels[1].to_json() == {
        "name": "stage1.conv1.weight + stage1.conv1 + PWN(stage1.conv1.relu)", "type": "CaskConvolution",
        "layers": ["PWN(stage1.conv1.relu)", "stage1.conv1", "stage1.conv1.relu", "stage1.conv1.weight"],
        "inputs": ["INT8"], "outputs": ["INT8"], "weights": "INT8", "tactic": "",
    }  # fmt: skip
    assert "fc" in kernels[3].layers and kernels[3].inputs == ("INT8",) and kernels[3].outputs == ("FLOAT",)


@pytest.mark.parametrize("form", FORMS)
def test_layers_kept_in_fp16_are_known_by_name(form: str) -> None:
    layers = engine(form, "INT8")
    layers[1] = kernel(form, "stage1.conv1", "HALF", "INT8", "HALF")
    kernels, types = read_kernels(text(layers)), dict.fromkeys(TYPES, "INT8")
    prove_kernels(kernels, {**types, "stage1.conv1": "HALF"})
    for wrong in (types, {**types, "stage1.conv2": "HALF"}, {**types, "stage1.conv1": "HALF", "fc": "HALF"}):
        with pytest.raises(ExportError, match="computes in"):
            prove_kernels(kernels, wrong)


TF32, F16, F32 = map(TACTIC.format, ("f32f32_tf32f32_f32", "f16f16_f16f32_f32", "f32f32_f32f32_f32"))
DOCTORED: Mapping[str, tuple[str, Layer, str]] = {
    "float convolution": ("HALF", kernel("10", "stage1.conv2", "FLOAT", "FLOAT", "FLOAT"), "FLOAT: expected HALF"),
    "float weights": ("HALF", kernel("11", "stage1.conv2", "HALF", "HALF", "FLOAT"), "FLOAT: expected HALF"),
    "weights not shown": ("HALF", kernel("11", "stage1.conv2", "FLOAT", "FLOAT", None), "FLOAT: expected HALF"),
    "TF32": ("FLOAT", kernel("10", "stage1.conv2", *["FLOAT"] * 3, TacticName=TF32), "TF32: expected FLOAT"),
    "fp16 under int8": ("INT8", kernel("10 words", "stage1.conv2", "HALF", "HALF", "HALF"), "HALF: expected INT8"),
    "fp16 that writes int8": ("INT8", kernel("10", "stage1.conv2", "HALF", "INT8", None), "HALF: expected INT8"),
    "fp16 product": ("INT8", product("10", "fc", "HALF", "FLOAT"), "FLOAT and HALF: expected INT8"),
    "float product in Myelin": (
        "HALF", {**product("11", "fc", "FLOAT", "FLOAT", F32), "LayerType": "fusion"}, "FLOAT: expected HALF"
    ),
    "tactic alone": ("INT8", kernel("10", "stage1.conv2", *[None] * 3, TacticName=F16), "HALF: expected INT8"),
    "no name is known": ("HALF", kernel("10", "__myl_0", "FLOAT", "FLOAT", "FLOAT"), "FLOAT: expected HALF"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOCTORED)
def test_an_engine_with_one_kernel_of_another_type_is_refused(case: str) -> None:
    kind, wrong, reason = DOCTORED[case]
    form = "11" if "Datatype" in wrong["Inputs"][0] else "10"
    layers = engine(form, kind)
    prove_kernels(read_kernels(text(layers)), dict.fromkeys(TYPES, kind))
    layers[3 if "fc" in wrong["Name"] else 2] = wrong
    with pytest.raises(ExportError, match=f"computes in {reason}"):
        prove_kernels(read_kernels(text(layers)), dict.fromkeys(TYPES, kind))


def test_types_hidden_by_dynamic_shapes_leave_the_weights_and_the_tactic() -> None:
    layers = [
        kernel("10", "stage1.conv1", None, None, "INT8"),
        kernel("10", "stage1.conv2", None, None, None, TacticName=TACTIC.format("i8i8_i8i32_f32")),
    ]
    kernels = read_kernels(text(layers))
    assert [k.types for k in kernels] == [{"INT8"}, {"INT8"}] and kernels[0].inputs == (None,)
    prove_kernels(kernels, dict.fromkeys(TYPES, "INT8"))
    with pytest.raises(ExportError, match="computes in INT8"):
        prove_kernels(kernels, dict.fromkeys(TYPES, "HALF"))


def test_an_inspector_that_shows_no_types_is_told(caplog: pytest.LogCaptureFixture) -> None:
    kernels = read_kernels(text([kernel("10", "fc", None, None, None)]))
    with caplog.at_level(logging.WARNING):
        prove_kernels(kernels, {"fc": "HALF"})
    assert "shows no types" in caplog.text
    caplog.clear()
    prove_kernels(read_kernels(text(engine("10", "HALF"))), dict.fromkeys(TYPES, "HALF"))
    assert not caplog.text


def test_every_layer_must_be_on_the_accelerator() -> None:
    types = dict.fromkeys(TYPES, "HALF")
    loadable = kernel("10", "stage1.conv1", "HALF", "HALF", None, LayerType="DLA")
    reformat = engine("10", "HALF")[0]
    prove_kernels(read_kernels(text([reformat, loadable])), types, dla=True)
    with pytest.raises(ExportError, match=r"EngineConfig\.dla_core: fc_myl0_3 runs on the GPU"):
        prove_kernels(read_kernels(text([reformat, loadable, product("10", "fc", "HALF", "HALF")])), types, dla=True)
    with pytest.raises(ExportError, match=r"EngineConfig\.dla_core: nothing of the engine runs on"):
        prove_kernels(read_kernels(text([reformat])), types, dla=True)


NO_ANSWERS: Mapping[str, str] = {
    "no JSON": "Layers: conv1",
    "names only": text(["stage1.conv1 + stage1.conv1.relu", "fc"]),
    "no layers": json.dumps({"Bindings": []}),
    "a number": "3",
}


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_another_form_is_refused(case: str) -> None:
    with pytest.raises(ExportError, match="the engine inspector's answer is not understood") as error:
        read_kernels(NO_ANSWERS[case])
    assert "\n" not in str(error.value)


def test_a_bare_list_of_layers_is_read() -> None:
    layers = engine("11", "HALF")
    assert read_kernels(json.dumps(layers)) == read_kernels(text(layers))
