"""Where quantisation stands in a graph and in the ONNX files written from it, and what it computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export import ExportError
from export.fusion.nodes import args_of, aten, is_call, module_path, named_args, parameter, resnet_deploy, source_name
from export.quantisation.quantise import quantise, quantised_values
from export.quantisation.scheme import CPU, TENSORRT, Scheme
from export.quantisation.split_addition import split_addition
from tests.export import networks
from tests.export import quantised as q8
from tests.export.networks import snapshot, values_of

CONV = resnet_deploy.conv2d_bias_act.default


@pytest.fixture(params=["basic", "resnet8", "bottleneck"])
def subject(request: pytest.FixtureRequest, in_8_bits: Mapping[str, q8.Subject]) -> q8.Subject:
    return in_8_bits[request.param]


@pytest.fixture
def resnet8_in_8_bits(in_8_bits: Mapping[str, q8.Subject]) -> q8.Subject:
    return in_8_bits["resnet8"]


def assert_right(subject: q8.Subject, scheme: Scheme) -> None:
    """Each value as its scales say, and each layer as near to the captured network as rounding its weights explains."""
    checks = subject.check(scheme, subject.simulated(subject.quantised[scheme]))
    assert checks and not checks.unchecked, checks.first_failure


def test_every_value_is_quantised_once_however_many_read_it(subject: q8.Subject, scheme: Scheme) -> None:
    """The file, in which equal nodes are one, would not show it."""
    pairs = q8.nodes(subject.quantised[scheme], q8.QUANTIZE)
    values = [args_of(node)[0] for node in pairs]
    assert len(values) == len(set(values)) and all(len(node.users) == 1 for node in pairs)
    assert not [value for value in values if q8.is_dequantised(value)]


def test_scales_follow_the_ranges(subject: q8.Subject, scheme: Scheme) -> None:
    program = subject.quantised[scheme]
    for node in q8.nodes(program, q8.QUANTIZE):
        value = args_of(node)[0]
        while is_call(value, aten.max_pool2d.default):
            value = args_of(args_of(value)[0])[0]
            value = args_of(value)[0] if is_call(value, q8.QUANTIZE) else value
        expected = scheme.activation(subject.calibration.ranges[str(source_name(value))])
        got = [parameter(program.master, constant) for constant in args_of(node)[1:]]
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), node.meta["label"]


def test_with_all_layers_kept_the_network_is_as_it_was(resnet8_in_8_bits: q8.Subject, scheme: Scheme) -> None:
    subject = resnet8_in_8_bits
    program = subject.keeping(*q8.layers(subject.program)).quantised[scheme]
    assert not q8.nodes(program, q8.QUANTIZE, q8.DEQUANTIZE)
    x = subject.images.double()
    with torch.no_grad():
        assert q8.relative_error(program.master(x), subject.program.master(x)) < networks.EXACT


def test_the_graph_is_left_as_it_was(resnet8_in_8_bits: q8.Subject, scheme: Scheme) -> None:
    master = split_addition(resnet8_in_8_bits.program.master)
    before = snapshot(master)
    quantise(master, resnet8_in_8_bits.calibration.ranges, scheme)
    assert snapshot(master) == before


def test_a_value_without_a_range_is_named(resnet8_in_8_bits: q8.Subject, scheme: Scheme) -> None:
    master = split_addition(resnet8_in_8_bits.program.master)
    for value in quantised_values(master, scheme):
        ranges = {k: v for k, v in resnet8_in_8_bits.calibration.ranges.items() if k != source_name(value)}
        with pytest.raises(ExportError, match="expected a calibrated range, got none") as caught:
            quantise(master, ranges, scheme)
        assert str(caught.value).startswith(f"{module_path(value)}: ")


def test_calibration_asks_for_what_is_pooled_once(subject: q8.Subject) -> None:
    """Maxima are among what they are chosen from."""
    split = split_addition(subject.program.master)
    assert not [value for value in quantised_values(split, CPU) if is_call(value, aten.max_pool2d.default)]


def test_a_range_beyond_float16_is_refused_by_name(resnet8_in_8_bits: q8.Subject) -> None:
    subject = resnet8_in_8_bits
    node = q8.layers(subject.program)["layer1.0.conv1"]
    ranges = {**subject.calibration.ranges, str(source_name(node)): (0.0, 1e8)}
    with pytest.raises(ExportError, match=r"layer1\.0\.conv1 reaches 1e\+08: no scale in torch\.float16 holds that"):
        quantise(subject.program.master, ranges, TENSORRT)
    quantise(split_addition(subject.program.master), ranges, CPU)


def nearly_dead() -> nn.Module:
    """One channel computes next to nothing from its input, but has a bias; one has neither; one only a bias."""
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        conv1.weight[1] *= 1e-12 / conv1.weight[1].abs().max()
        conv1.weight[2:4] = 0.0
        conv1.weight[4] = 1e-30
        conv1.get_parameter("bias")[1:5] = torch.tensor([1.0, 0.0, 0.7, -3.0])
    return nn.Sequential(conv1, conv2).eval()


def test_a_bias_that_int32_could_not_hold_is_right_all_the_same(pictures: dict[str, Tensor], scheme: Scheme) -> None:
    subject = q8.quantised(nearly_dead(), pictures["resnet8"])
    program, x = subject.quantised[scheme], subject.images.double()
    with torch.no_grad():
        expected = copy.deepcopy(subject.model.get_submodule("0")).double()(x)
    y = values_of(program.master, x)[q8.layers(program)["0"].name]
    step = (expected.amax() - expected.amin()) / 255
    assert (y - expected).abs().amax() < 2 * step
    for channel, value in ((1, 1.0), (2, 0.0), (3, 0.7), (4, -3.0)):
        assert (y[:, channel] - value).abs().max() < 2.0**-20, channel
    checks = subject.check(scheme, subject.trace(scheme, subject.shown(scheme)))
    assert checks, checks.first_failure


@pytest.mark.parametrize("network", networks.LAYERS, ids=q8.name_of)
def test_any_network_is_quantised_throughout(network: networks.Network, in_8_bits: Mapping[Any, q8.Subject]) -> None:
    subject = in_8_bits[network]
    for scheme, program in subject.quantised.items():
        layers = q8.nodes(program, CONV, aten.linear.default)
        assert len(layers) == networks.LAYERS[network]
        for node in layers:
            assert is_call(args_of(args_of(node)[0])[0], q8.QUANTIZE) and q8.is_dequantised(args_of(node)[1])
            residual = named_args(node).get("residual")
            assert residual is None or q8.is_dequantised(residual)
        assert_right(subject, scheme)
