"""What people build round residual blocks, in 8 bits: every value and layer of it is held to the network as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from export import FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.operators import check_operators
from export.criteria.spread import draws, spread
from export.fusion.nodes import args_of, aten, deep_copy, is_call, parameter, resnet_deploy
from export.fusion.program import QuantisedProgram
from export.lowering.runners import ProgramRunner
from export.quantisation.scheme import Scheme
from export.runtime.bundle.golden import load_golden, save_golden
from export.runtime.parity.checks import OperatorChecks
from export.runtime.parity.ladder import References
from kernels.rounding import ROUNDING_RMS
from tests.export import quantised as q8
from tests.export.networks import BATCH, Called, values_of
from tests.export.zoo import ZOO


def conv(channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, **more: Any) -> nn.Sequential:
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False, **more)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


def stem() -> nn.Sequential:
    return nn.Sequential(*conv(3, 16, stride=2), nn.ReLU())


def up(x: Tensor, mode: str = "nearest") -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode=mode)


def shortcuts() -> nn.Module:
    """A block's output read by the next branch and, pooled, padded, flipped, sliced or blurred, by its shortcut."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = m.stem(x)
        x = F.relu(m.a(x) + x)
        x = F.relu(m.b(x) + m.c(F.pad(torch.flip(x, [3]), (1, 1, 1, 1), "reflect")[:, :, :-2, :-2]))
        x = F.relu(m.d(x) + m.e(F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)))
        blurred = F.conv2d(F.pad(F.max_pool2d(x, 2, 1), (1, 1, 1, 1), "reflect"), m.blur, stride=2, groups=24)
        x = F.relu(m.f(blurred) + m.g(F.pad(x, (0, 1, 0, 1), "replicate"))[:, :, :-1, :-1][:, :, :4, :4])
        return m.fc(F.relu(m.h(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))

    taps = torch.tensor([1.0, 2.0, 1.0])
    parts = {"a": conv(16, 16), "b": conv(16, 16), "c": conv(16, 16, 1), "d": conv(16, 24, stride=2)}
    parts |= {"e": conv(16, 24, 1), "f": conv(24, 24), "g": conv(24, 24, stride=2), "h": conv(24, 32, stride=2)}
    blur = (taps[:, None] * taps / 16).repeat(24, 1, 1, 1)
    return Called(call, stem=stem(), blur=blur, fc=nn.Linear(32, 5), **parts)


def pyramid() -> nn.Module:
    """FPN: what is enlarged is added to a lateral layer, read on and returned; heads of one channel."""

    def call(x: Tensor, m: Any) -> dict[str, Tensor]:
        c3 = m.stem(x)
        c4 = F.relu(m.down(c3))
        p4 = m.lateral4(c4)
        p3 = m.lateral3(c3) + up(p4)
        levels = {"p3": m.smooth(p3), "p4": p4, "p5": F.max_pool2d(p4, 1, 2)}
        return {**levels, "boxes": torch.cat([F.relu(m.box(p)).flatten(2) * 16 + 16 for p in (p3, p4)], 2)}

    laterals = {"lateral3": nn.Conv2d(16, 12, 1), "lateral4": nn.Conv2d(24, 12, 1), "box": nn.Conv2d(12, 1, 3)}
    return Called(call, stem=stem(), down=conv(16, 24, stride=2), smooth=nn.Conv2d(12, 12, 3), **laterals)


def heads() -> nn.Module:
    """No layer at the beginning, the input at two sizes, constants added, and heads of one and of several values."""

    def call(x: Tensor, m: Any) -> dict[str, Tensor]:
        x = (x - m.mean) / m.deviation
        small = m.low(F.avg_pool2d(x, 2))
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2], m.grid.expand(x.shape[0], -1, -1, -1)], 1)
        x = F.relu(m.conv(m.bn(x)) + m.position + small)
        f = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        points = m.points(f).view(-1, 4, 2) * 16 + 16
        return {"sex": torch.softmax(m.sex(f), 1), "age": m.age(f).abs() + 40.0, "points": points, "features": f}

    constants = {"mean": torch.tensor([0.1, 0.2, 0.0])[:, None, None], "deviation": torch.full((1, 3, 1, 1), 1.2)}
    constants |= {"position": torch.randn(1, 16, 16, 16) * 0.3, "grid": torch.rand(1, 2, 16, 16)}
    parts = {"low": nn.Conv2d(3, 16, 3, padding=1), "bn": nn.BatchNorm2d(8), "conv": conv(8, 16)}
    outputs = {"sex": nn.Linear(16, 2), "age": nn.Linear(16, 1), "points": nn.Linear(16, 8)}
    return Called(call, **constants, **parts, **outputs)


REPVGG, UNET, IRESNET, CBAM, ECA, SHUFFLENET, PREACT = (
    ZOO[name] for name in ("repvgg", "unet", "iresnet", "cbam", "eca", "shufflenet", "preact")
)
KINDS = [shortcuts, pyramid, heads, REPVGG, UNET, IRESNET, CBAM, ECA, SHUFFLENET, PREACT]


@pytest.mark.parametrize("network", KINDS, ids=q8.name_of)
def test_right_networks_pass(network: Callable[[], nn.Module], in_8_bits: Mapping[Any, q8.Subject]) -> None:
    """Both files, in ONNX Runtime, value by value and at the outputs."""
    subject = in_8_bits[network]
    for scheme in subject.quantised:
        rung = subject.judge(scheme)
        assert rung and rung.operators and not rung.operators.unchecked, (scheme.name, rung.verdict)


def test_what_is_quantised_for_one_reader_all_read_so(in_8_bits: Mapping[Any, q8.Subject], scheme: Scheme) -> None:
    """But for what is returned. What is sliced, flipped, enlarged or padded of it keeps its scale, exactly."""
    rounded_once = 0
    for program in (in_8_bits[network].quantised[scheme] for network in (shortcuts, pyramid)):
        for node in q8.nodes(program, q8.QUANTIZE):
            value = args_of(node)[0]
            assert {reader.op for reader in value.users if reader is not node} <= {"output"}
            while is_call(value, *MOVES):
                value = args_of(value)[0]
            if is_call(value, q8.DEQUANTIZE):
                assert torch.equal(*(parameter(program.master, args_of(n)[1]) for n in (value, node)))
                rounded_once += 1
    assert rounded_once >= 3


MOVES = (aten.flip.default, aten.slice.Tensor, aten.pad.default, aten.contiguous.default)


def changed(
    subject: q8.Subject, scheme: Scheme, find: Callable[[fx.Node], bool], edit: Callable[[fx.Node], None]
) -> OperatorChecks:
    """What is said of a quantised graph with one node edited, of which the candidate computes what it says."""
    program = QuantisedProgram(subject.program, deep_copy(subject.quantised[scheme].master))
    node = next(filter(find, program.master.graph.nodes))
    edit(node)
    program.master.graph.eliminate_dead_code()
    program.master.recompile()
    return subject.check(scheme, subject.simulated(program), program)


def call_of(*targets: Any) -> Callable[[fx.Node], bool]:
    return lambda node: is_call(node, *targets)


def skip(node: fx.Node) -> None:
    """Its readers read what it read."""
    node.replace_all_uses_with(args_of(node)[0])


def argument(index: int, value: Any) -> Callable[[fx.Node], None]:
    return lambda node: node.update_arg(index, value)


def constant_padding(node: fx.Node) -> None:
    node.update_arg(2, "constant")


WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[fx.Node], bool], Callable[[fx.Node], None]]] = {
    "flip lost": (shortcuts, call_of(aten.flip.default), skip),
    "slice one later": (shortcuts, lambda n: is_call(n, aten.slice.Tensor) and 2 in n.args[4:], argument(2, 1)),
    "padding of zeros": (shortcuts, lambda n: is_call(n, aten.pad.default) and "reflect" in n.args, constant_padding),
    "softmax lost at the end": (heads, call_of(aten.softmax.int), skip),
    "a constant lost at the end": (heads, lambda n: is_call(n, aten.add.Tensor) and 16 in n.args[1:], skip),
    "length left as it was": (ZOO["embedding"], call_of(aten.div.Tensor), skip),
    "a gate lost": (ECA, call_of(aten.sigmoid.default), skip),
    "negated": (heads, call_of(aten.abs.default), lambda node: setattr(node, "target", aten.neg.default)),
}  # fmt: skip


@pytest.mark.parametrize("defect", WRONG)
def test_wrong_graphs_are_refused(defect: str, in_8_bits: Mapping[Any, q8.Subject], scheme: Scheme) -> None:
    network, find, edit = WRONG[defect]
    assert not changed(in_8_bits[network], scheme, find, edit)


def one_output(pictures: Tensor, rounded: Callable[[Tensor], tuple[Tensor, Tensor]]) -> nn.Module:
    """A network whose one output is, of many, the one that rounding its weights hits hardest.

    `rounded`: weights [1, 16] float64 -> what they become, and the standard deviation of that.
    """
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(16, 1)
    with torch.no_grad():
        features, found = body(pictures).double(), []
        for weight in torch.randn(200, 1, 16):
            values, deviation = rounded(weight.double())
            error = (values - weight) @ features.T
            found.append(((error.norm() / (deviation.square() @ features.square().T).sum().sqrt()).item(), weight))
        head.weight.copy_(max(found, key=lambda pair: pair[0])[1])
        head.bias.copy_(100 - (head.weight @ features.float().mean(0)))
    return Called(lambda x, m: m.head(m.body(x)).abs() - 100, body=body, head=head).eval()


def test_one_output_channel_is_one_draw(pictures: dict[str, Tensor], scheme: Scheme) -> None:
    """All its values share one rounding of its weights, so their mean error says nothing; one step too many does.

    It is a small difference of large sums besides: what is summed is rounded, and not only what is left of it.
    """

    def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
        whole, step = scheme.weight(weight)
        return whole * step, (step / 12**0.5).expand(1, 16)

    subject = q8.quantised(one_output(pictures["resnet8"], in_8_bits), pictures["resnet8"])
    program, trace = subject.quantised[scheme], subject.trace(scheme, subject.shown(scheme))
    checks = subject.check(scheme, trace)
    (layer,) = (check for check in checks.checks if check.kind == "layer" and check.name == "head")
    assert checks and layer.to_json()["lsb"] > 1.6, checks.first_failure
    (output,) = (node for node in program.master.graph.nodes if is_call(node, aten.sub.Tensor))
    roundoffs = (100 * scheme.arithmetic.roundoff) * torch.tensor([60.0, 0.0, 0.0, 0.0])[:, None]
    assert not subject.check(scheme, {**trace, output.name: trace[output.name] + roundoffs})
    with torch.no_grad():
        whole = parameter(program.master, args_of(args_of(q8.layers(program)["head"])[1])[0])
        whole[0, int(whole.abs().argmin())] += 1
    assert not subject.check(scheme, subject.simulated(program))


@pytest.mark.parametrize("level", ["b", "c3"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_one_output_channel_is_one_draw_in_16_bits_too(pictures: dict[str, Tensor], precision: str, level: str) -> None:
    """One in nine heads was refused; the worst passes, and not with weights that are other than the nearest."""
    p = PRECISIONS[precision]
    model = one_output(pictures["resnet8"], lambda w: (w.to(p.dtype).double(), ROUNDING_RMS * p.roundoff * w.abs()))
    with torch.no_grad():
        model.get_parameter("head.bias").sub_(100)
    model = Called(lambda x, m: m.head(m.body(x)), body=model.get_submodule("body"), head=model.get_submodule("head"))
    x = pictures["resnet8"][:4]
    program = fuse(model.eval(), x, BATCH, level)
    checks = check_operators(program, p, simulate(program, precision, x))
    assert checks, checks.diagnosis
    wrong = deep_copy(program)
    (node,) = (
        n for n in wrong.master.graph.nodes if is_call(n, aten.linear.default, resnet_deploy.mean_linear.default)
    )
    with torch.no_grad():
        weight = parameter(wrong.master, args_of(node)[1])
        weight += 16 * p.roundoff * weight.abs()
    assert not check_operators(program, p, simulate(wrong, precision, x))


def simulate(program: FusedProgram, precision: str, x: Tensor) -> dict[str, Tensor]:
    with ProgramRunner(program, PRECISIONS[precision], ("output",)) as runner:
        return runner.trace({"input": x.numpy()})


def test_spread_counts_what_is_summed(pictures: dict[str, Tensor]) -> None:
    model = Called(lambda x, m: ((m.conv(x) + 1000).abs() - 1000).argmax(1), conv=nn.Conv2d(3, 2, 1))
    subject = q8.quantised(model.eval(), pictures["resnet8"])
    graph, u = subject.program.master, 2.0**-11
    nodes = {node.name: node for node in graph.graph.nodes}
    leaves = {"x": subject.images.double()}
    assert spread(graph, nodes["x"], leaves, u).max() == 0
    (last,) = (node for node in graph.graph.nodes if is_call(node, aten.sub.Tensor))
    assert 900 * u < spread(graph, last, leaves, u).median() < 2500 * u  # of three steps that large
    (classes,) = (node for node in graph.graph.nodes if is_call(node, aten.argmax.default))
    exact = values_of(graph, leaves["x"])[classes.name]
    changed = [
        [float((y != exact).double().mean()) for y in draws(graph, classes, leaves, by)] for by in (u, u / 2**13)
    ]
    assert min(changed[0]) > 0.05 > 0.01 > max(changed[1])


def test_golden_outputs_of_wider_layers_come_last() -> None:
    """The first are what the others are held to, and 16 bits round far less than 8 do."""
    outputs = {"output": torch.zeros(1, 2).numpy()}
    names = ("fp16", "sim. cpu", "sim. tensorrt")
    loaded = load_golden(
        save_golden(References({"input": torch.zeros(1, 3, 2, 2).numpy()}, dict.fromkeys(names, outputs), outputs))
    )
    assert list(loaded.rounded) == [*names[1:], names[0]]
