"""Where quantisation stands in a graph and in the ONNX files written from it, and what it computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from export import ExportError, fuse
from export.fusion.nodes import args_of, aten, is_call, module_path, parameter, schema_name, source_name
from export.quantisation.quantise import quantise, quantised_values
from export.quantisation.scheme import CPU, TENSORRT, Range, Scheme
from export.quantisation.sensitivity import layer_costs
from export.quantisation.split_addition import split_addition
from kernels.operators.quantize_linear import dequantize_linear, quantize_linear
from tests.export import networks
from tests.export import quantised as q8
from tests.export.networks import Called, snapshot, values_of


@pytest.fixture(params=["basic", "resnet8", "bottleneck"])
def subject(request: pytest.FixtureRequest, in_8_bits: Mapping[str, q8.Subject]) -> q8.Subject:
    return in_8_bits[request.param]


@pytest.fixture
def resnet8_in_8_bits(in_8_bits: Mapping[str, q8.Subject]) -> q8.Subject:
    return in_8_bits["resnet8"]


def test_every_value_is_quantised_once_however_many_read_it(subject: q8.Subject, scheme: Scheme) -> None:
    """The file, in which equal nodes are one, would not show it."""
    pairs = q8.nodes(subject.quantised[scheme], q8.QUANTIZE)
    values = [args_of(node)[0] for node in pairs]
    assert len(values) == len(set(values)) and all(len(node.users) == 1 for node in pairs)
    assert not [value for value in values if is_call(value, q8.DEQUANTIZE)]
    asked = quantised_values(split_addition(subject.program.master), scheme)  # maxima are among what they are of
    assert not [value for value in asked if is_call(value, aten.max_pool2d.default)]


def test_scales_follow_the_ranges(subject: q8.Subject, scheme: Scheme) -> None:
    """P4 looks ranges up as the pass does."""
    program = subject.quantised[scheme]
    for node in q8.nodes(program, q8.QUANTIZE):
        value = args_of(node)[0]
        if not is_call(value, aten.max_pool2d.default):
            expected = scheme.activation(subject.calibration.ranges[str(source_name(value))])
            got = (parameter(program.master, constant) for constant in args_of(node)[1:])
            assert all(map(torch.equal, got, expected)), node.meta["label"]


def test_with_all_layers_kept_the_network_is_as_it_was(resnet8_in_8_bits: q8.Subject, scheme: Scheme) -> None:
    subject = resnet8_in_8_bits
    program = subject.keeping(*q8.layers(subject.program)).quantised[scheme]
    assert not q8.nodes(program, q8.QUANTIZE, q8.DEQUANTIZE)
    x = subject.images.double()
    with torch.no_grad():
        assert q8.relative_error(program.master(x), subject.program.master(x)) < networks.EXACT


def test_a_value_without_a_range_is_named(resnet8_in_8_bits: q8.Subject, scheme: Scheme) -> None:
    """And the graph is left as it was."""
    master = split_addition(resnet8_in_8_bits.program.master)
    before = snapshot(master)
    quantise(master, resnet8_in_8_bits.calibration.ranges, scheme)
    assert snapshot(master) == before
    for value in quantised_values(master, scheme):
        ranges = {k: v for k, v in resnet8_in_8_bits.calibration.ranges.items() if k != source_name(value)}
        with pytest.raises(ExportError, match="expected a calibrated range, got none") as caught:
            quantise(master, ranges, scheme)
        assert str(caught.value).startswith(f"{module_path(value)}: ")


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


RANGES: dict[str, Range] = {
    "around 0": (-2.1, 1.7),
    "behind a ReLU": (0.0, 6.3),
    "below 0": (-3.3, -0.1),
    "above 0": (0.1, 3.3),
    "lopsided": (-0.001, 9.9),
    "large": (-3e4, 2e4),
    "small": (-1e-4, 2e-4),
    "a third": (-1 / 3, 1 / 3),
}


def held_exactly(scheme: Scheme, scale: Tensor) -> bool:
    """Whether the type of the file's scales has that value."""
    return scale.dtype == torch.float64 and torch.equal(scale.to(scheme.arithmetic.dtype).double(), scale)


@pytest.mark.parametrize("case", RANGES)
def test_the_scale_is_the_smallest_that_covers_the_range(scheme: Scheme, case: str) -> None:
    low, high = RANGES[case]
    scale, zero_point = scheme.activation((low, high))
    limits = torch.iinfo(scheme.dtype)
    wanted = max(-low, high) / 127 if scheme.symmetric else (max(high, 0.0) - min(low, 0.0)) / 255
    assert held_exactly(scheme, scale) and scale.shape == zero_point.shape == ()
    assert wanted <= scale.item() <= wanted * (1 + 4 * scheme.arithmetic.roundoff) + 1e-7 * (wanted < 1e-4)
    assert zero_point.dtype == scheme.dtype and limits.min <= zero_point.item() <= limits.max
    # Everything comes back to within half a step, but the two ends: the zero point is a whole number. 0 is exact.
    values = torch.tensor([0.0, *torch.linspace(low, high, 1001)], dtype=torch.float64)
    whole = quantize_linear(values, scale, zero_point)
    error = (dequantize_linear(whole, scale, zero_point) - values).abs()
    inner = (values > low + 0.6 * scale) & (values < high - 0.6 * scale)
    assert error.max() <= scale * (1 + 1e-9) and error[inner].max() <= scale * (0.5 + 1e-9)
    assert whole[0] == zero_point and error[0] == 0.0


def test_each_scheme_uses_its_numbers() -> None:
    """The symmetric one leaves the lowest out."""
    for scheme, limits, expected in ((TENSORRT, (-12.7, 12.7), [-127, 127]), (CPU, (-1.0, 3.0), [0, 255])):
        assert quantize_linear(torch.tensor(limits).double(), *scheme.activation(limits)).tolist() == expected
    assert TENSORRT.activation((-12.7, 12.7))[1].item() == 0
    assert CPU.activation((0.0, 5.0))[1].item() == 0 and CPU.activation((-5.0, 0.0))[1].item() == 255
    assert [[x.item() for x in scheme.activation((0.0, 5e-324))] for scheme in (TENSORRT, CPU)] == [[1.0, 0]] * 2


@pytest.mark.parametrize("size", [1e-9, 1e-42, 1e-300])
def test_ranges_below_what_the_type_resolves_have_a_positive_scale(scheme: Scheme, size: float) -> None:
    scale, _ = scheme.activation((-size, size))
    assert held_exactly(scheme, scale) and size / 255 <= scale.item() < 1


# one channel each: what its weights are multiplied with
CHANNELS = {
    "ordinary": 1.0,
    "zero": 0.0,
    "tiny": 1e-9,
    "below float16": 1e-12,
    "below float32": 1e-42,
    "denormal": 1e-310,
    "large": 500.0,
    "a third": 1 / 3,
}


@pytest.mark.parametrize("shape", [(3, 3, 3), (16, 1, 1), (40,)], ids=["3x3", "1x1", "linear"])
def test_weights_come_back_to_within_half_a_step(scheme: Scheme, shape: tuple[int, ...]) -> None:
    """Each channel with all of its numbers, where the type resolves it and its scale may be as small as that."""
    unit = torch.randn(len(CHANNELS), *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = (-1, *[1] * len(shape))
    weight = unit * torch.tensor(list(CHANNELS.values()), dtype=torch.float64).reshape(each)
    free = scheme.weight(weight)[1]
    smallest = torch.full((len(weight),), 1e-3, dtype=torch.float64)
    smallest[0] = 0.0
    for least in (None, smallest):
        q, scale = scheme.weight(weight, least)
        assert held_exactly(scheme, scale) and q.dtype == torch.int8 and q.min() >= -127
        assert ((q.double() * scale.reshape(each) - weight).abs() <= (0.5 + 1e-9) * scale.reshape(each)).all()
        peaks = dict(zip(CHANNELS, q.abs().flatten(1).amax(1).tolist(), strict=True))
        assert peaks["ordinary"] == peaks["large"] == 127 and peaks["zero"] == 0
        assert least is not None or scheme is TENSORRT or peaks["tiny"] == peaks["below float16"] == 127
        assert torch.equal(scheme.weight(-weight, least)[0], -q)  # the zero point is 0
    assert free[1] == 1.0 and bool((scale >= smallest).all())
    above = (free >= smallest) & (weight.flatten(1).amax(1) > 0)
    assert torch.equal(scale[above], free[above]) and 0 < above.sum() < len(above)


@pytest.fixture
def wide(pictures: dict[str, Tensor]) -> q8.Subject:
    """The middle one of three convolutions reads a few values that are 300 times as large as all others."""
    torch.manual_seed(0)
    first, middle, last = (nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8))
    with torch.no_grad():
        first.weight[0] *= 300.0
        middle.weight[:, 0] /= 300.0
    model = Called(lambda x, m: m.last(m.middle(m.first(x).relu()).relu()), first=first, middle=middle, last=last)
    return q8.quantised(model.eval(), pictures["resnet8"])


def test_a_cost_is_the_error_with_that_layer_alone(wide: q8.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the float network, on the pictures that were given; the highest first, and progress is told."""
    monkeypatch.setattr("export.base.progress._SECONDS", 0.0)
    x, said = wide.images[:4], list[str]()
    costs = layer_costs(wide.program.master, wide.calibration.ranges, {"input": x}, said.append)
    assert said == [f"quantise one layer at a time: {done} of 3 done" for done in range(3)]
    assert costs[0].name == "middle" and costs[0].error > 5 * costs[1].error > 5 * costs[2].error > 0
    for cost in costs:
        alone = wide.keeping(*({"first", "middle", "last"} - {cost.name})).quantised[TENSORRT]
        with torch.no_grad():
            assert cost.error == q8.relative_error(alone(x), wide.program(x))


def test_of_several_outputs_the_first_counts(pictures: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Called(lambda x, m: (m.shown(x), m.other(x)), shown=nn.Conv2d(3, 4, 1), other=nn.Conv2d(3, 4, 1))
    subject = q8.quantised(model.eval(), pictures["resnet8"])
    first, second = layer_costs(subject.program.master, subject.calibration.ranges, {"input": subject.images})
    assert (first.name, second.name, second.error) == ("shown", "other", 0.0) and first.error > 0


ACTS: dict[str, nn.Module] = {
    "hardtanh": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(0.2), "prelu": nn.PReLU(3), "silu": nn.SiLU(),
    "gelu": nn.GELU("tanh"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTS)
def test_an_activation_stays_behind_the_sum(kind: str, resnet8: networks.Fused) -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = networks.Called(lambda x, m: m.act(m.conv(x.relu()) + x), conv=conv, act=ACTS[kind])
    master, x = fuse(model.eval(), resnet8.images, networks.BATCH, "b").master, resnet8.images[:2].double()
    split = split_addition(master)
    assert [schema_name(n) for n in split.graph.nodes][-3:] == ["add", kind, ""]
    assert torch.allclose(split(x), master(x), rtol=0, atol=1e-14)
