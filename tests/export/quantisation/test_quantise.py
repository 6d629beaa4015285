"""Where quantisation stands in a graph and in the ONNX files written from it, and what it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from export import ExportError
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import args_of, aten, is_call, module_path, named_args, parameter, resnet_deploy, source_name
from export.quantisation.quantise import quantisable, quantise, quantised_values
from export.quantisation.scheme import CPU, TENSORRT, Scheme
from export.quantisation.split_addition import split_addition
from tests.export import networks
from tests.export import quantised as q8

CONV = resnet_deploy.conv2d_bias_act.default
POOLED = ("basic", "bottleneck")


@pytest.fixture(params=["basic", "resnet8", "bottleneck"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def subject(in_8_bits: dict[str, q8.Subject], name: str) -> q8.Subject:
    return in_8_bits[name]


@pytest.fixture(params=q8.SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return q8.SCHEMES[request.param]


def assert_right(subject: q8.Subject, scheme: Scheme) -> None:
    """Each value as its scales say, and each layer as near to the captured network as rounding its weights explains."""
    checks = subject.check(scheme, subject.simulated(subject.quantised[scheme]))
    assert checks and not checks.unchecked, checks.first_failure


# the graph


def test_weights_stand_for_the_right_layers(subject: q8.Subject, scheme: Scheme) -> None:
    """Half a step from those of the graph before."""
    program = subject.quantised[scheme]
    floats, quantised = q8.layers(subject.program), q8.layers(program)
    assert floats.keys() == quantised.keys()
    for path, node in quantised.items():
        whole, scale, _ = (q8.constant_of(program, constant) for constant in args_of(args_of(node)[1]))
        steps = scale.reshape(-1, *[1] * (whole.dim() - 1))
        exact = parameter(subject.program.master, args_of(floats[path])[1])
        assert ((whole.double() * steps - exact).abs() <= (0.5 + 1e-9) * steps).all(), path


def test_in_the_scheme_for_cpus_biases_are_whole_numbers(subject: q8.Subject) -> None:
    """In the unit of the accumulator, scale of the input times scale of the weights: ONNX Runtime takes no other."""
    program = subject.quantised[CPU]
    floats = q8.layers(subject.program)
    for path, node in q8.layers(program).items():
        x, weight, bias = args_of(node)[:3]
        assert q8.is_dequantised(bias) and args_of(bias)[2] is None
        whole, unit = (q8.constant_of(program, constant) for constant in args_of(bias)[:2])
        scale_x, scale_w = (q8.constant_of(program, args_of(node)[1]) for node in (x, weight))
        assert whole.dtype == torch.int32 and torch.equal(unit, scale_x * scale_w)
        exact = parameter(subject.program.master, args_of(floats[path])[2])
        assert ((whole.double() * unit - exact).abs() <= (0.5 + 1e-6) * unit).all()


def test_every_value_is_quantised_once_however_many_read_it(subject: q8.Subject, scheme: Scheme) -> None:
    program = subject.quantised[scheme]
    pairs = q8.nodes(program, q8.QUANTIZE)
    values = [args_of(node)[0] for node in pairs]
    assert len(values) == len(set(values)) and all(len(node.users) == 1 for node in pairs)
    assert not [value for value in values if q8.is_dequantised(value)]
    master = split_addition(subject.program.master) if scheme is CPU else subject.program.master
    wanted = set()
    for node in master.graph.nodes:
        if node in quantisable(master):
            wanted |= {args_of(node)[0], *([args_of(node)[3]] if is_call(node, CONV) else [])} - {None}
        elif is_call(node, aten.max_pool2d.default, aten.mean.dim):
            wanted.add(args_of(node)[0])
        elif is_call(node, aten.add.Tensor):
            wanted |= set(args_of(node))
    assert {(source_name(value), module_path(value)) for value in values} == {
        (source_name(value), module_path(value)) for value in wanted
    }
    labels = [node.meta["label"] for node in (*pairs, *q8.nodes(program, q8.DEQUANTIZE))]
    assert len(labels) == len(set(labels)) and "input.quantized" in labels


@pytest.mark.parametrize("name", POOLED)
def test_a_pool_reads_and_returns_values_of_one_scale(
    in_8_bits: dict[str, q8.Subject], name: str, scheme: Scheme
) -> None:
    program = in_8_bits[name].quantised[scheme]
    (pool,) = q8.nodes(program, aten.max_pool2d.default)
    before = args_of(pool)[0]
    assert is_call(q8.quantised_by(before), CONV)
    (after,) = (node for node in pool.users if is_call(node, q8.QUANTIZE))
    for one, other in zip(args_of(before)[1:], args_of(after)[1:], strict=True):
        assert torch.equal(q8.constant_of(program, one), q8.constant_of(program, other))


def test_the_mean_has_a_range_of_its_own(subject: q8.Subject, scheme: Scheme) -> None:
    program = subject.quantised[scheme]
    (mean,) = q8.nodes(program, aten.mean.dim)
    q8.quantised_by(args_of(mean)[0])
    features = args_of(q8.layers(program)["fc"])[0]
    scales = [q8.constant_of(program, args_of(node)[1]).item() for node in (args_of(mean)[0], features)]
    assert scales[1] < scales[0]


def test_scales_follow_the_ranges(subject: q8.Subject, scheme: Scheme) -> None:
    program = subject.quantised[scheme]
    for node in q8.nodes(program, q8.QUANTIZE):
        value = args_of(node)[0]
        while is_call(value, aten.max_pool2d.default):
            value = args_of(args_of(value)[0])[0]
            value = args_of(value)[0] if is_call(value, q8.QUANTIZE) else value
        expected = scheme.activation(subject.calibration.ranges[str(source_name(value))])
        got = [q8.constant_of(program, constant) for constant in args_of(node)[1:]]
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), node.meta["label"]


def test_with_all_layers_kept_the_network_is_as_it_was(in_8_bits: dict[str, q8.Subject], scheme: Scheme) -> None:
    subject = in_8_bits["resnet8"]
    program = subject.keeping(*q8.layers(subject.program)).quantised[scheme]
    assert not q8.nodes(program, q8.QUANTIZE, q8.DEQUANTIZE)
    x = subject.images.double()
    with torch.no_grad():
        assert q8.relative_error(program.master(x), subject.program.master(x)) < networks.EXACT


@pytest.mark.parametrize("name", ["basic", "resnet8"])
def test_the_network_still_computes_what_it_did(subject: q8.Subject, scheme: Scheme) -> None:
    assert_right(subject, scheme)
    assert not torch.equal(subject.quantised[scheme](subject.images), subject.program(subject.images))


def test_the_graph_is_left_as_it_was(in_8_bits: dict[str, q8.Subject], scheme: Scheme) -> None:
    subject = in_8_bits["resnet8"]
    master = split_addition(subject.program.master)
    code, names = str(master.graph), [name for name, _ in master.named_buffers()]
    meta = [dict(node.meta) for node in master.graph.nodes]
    values = {name: value.clone() for name, value in [*master.named_parameters(), *master.named_buffers()]}
    quantise(master, subject.calibration.ranges, scheme)
    assert str(master.graph) == code and [name for name, _ in master.named_buffers()] == names
    assert [dict(node.meta) for node in master.graph.nodes] == meta
    for name, value in [*master.named_parameters(), *master.named_buffers()]:
        assert torch.equal(value, values[name])


def test_a_value_without_a_range_is_named(in_8_bits: dict[str, q8.Subject], scheme: Scheme) -> None:
    subject = in_8_bits["resnet8"]
    master = split_addition(subject.program.master)
    for value in quantised_values(master, CPU):
        ranges = {k: v for k, v in subject.calibration.ranges.items() if k != source_name(value)}
        if value not in quantised_values(master, scheme):
            continue
        with pytest.raises(ExportError, match="expected a calibrated range, got none") as caught:
            quantise(master, ranges, scheme)
        assert str(caught.value).startswith(f"{module_path(value)}: ")


def test_calibration_asks_for_all_that_either_scheme_needs(subject: q8.Subject) -> None:
    """Of what is pooled it asks once: maxima are among what they are chosen from."""
    split = split_addition(subject.program.master)
    assert not [value for value in quantised_values(split, CPU) if is_call(value, aten.max_pool2d.default)]
    both = {source_name(value) for value in quantised_values(split, CPU)}
    assert {source_name(value) for value in quantised_values(subject.program.master, TENSORRT)} <= both
    assert both == subject.calibration.ranges.keys()


def test_a_range_beyond_float16_is_refused_by_name(in_8_bits: dict[str, q8.Subject]) -> None:
    subject = in_8_bits["resnet8"]
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
    interpreter = GraphInterpreter(program.master, {})
    interpreter.values = {}
    with torch.no_grad():
        interpreter.run(x)
        expected = copy.deepcopy(subject.model.get_submodule("0")).double()(x)
    y = interpreter.values[q8.layers(program)["0"].name]
    step = (expected.amax() - expected.amin()) / 255
    assert (y - expected).abs().amax() < 2 * step
    for channel, value in ((1, 1.0), (2, 0.0), (3, 0.7), (4, -3.0)):
        assert (y[:, channel] - value).abs().max() < 2.0**-20, channel
    checks = subject.check(scheme, subject.trace(scheme, subject.shown(scheme)))
    assert checks, checks.first_failure


# networks of other shapes


@pytest.mark.parametrize("network", networks.LAYERS, ids=lambda network: network.__name__)
def test_any_network_is_quantised_throughout(network: type[nn.Module], pictures: dict[str, Tensor]) -> None:
    subject = q8.quantised(networks.make(network, pictures["resnet8"]), pictures["resnet8"])
    for scheme, program in subject.quantised.items():
        layers = q8.nodes(program, CONV, aten.linear.default)
        assert len(layers) == networks.LAYERS[network]
        for node in layers:
            assert is_call(args_of(args_of(node)[0])[0], q8.QUANTIZE) and q8.is_dequantised(args_of(node)[1])
            residual = named_args(node).get("residual")
            assert residual is None or q8.is_dequantised(residual)
        assert_right(subject, scheme)
