"""What people write in `forward`, return from it and wrap round it: exported right, or refused in one line."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from export import Batch, ExportError, fuse
from export.base.batch import Arrays, Inputs
from export.base.precision import PRECISIONS
from export.criteria.batches import check_batches
from export.criteria.references import run_references
from export.fusion.nodes import weighs
from export.fusion.program import FusedProgram, operator_nodes, output_names
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import EagerRunner, ProgramRunner, TracedOnnxRunner
from export.runtime.parity.ladder import execute, judge, mixed_rows
from export.runtime.parity.rungs import Rung
from tests.export.networks import BATCH, Called, Fused, judged, make

Forward = Callable[[Tensor, Any], object]
FP32 = PRECISIONS["fp32"]


def network(forward: Forward, **parts: nn.Module) -> nn.Module:
    """A stem and whatever `forward(stem's result, the network)` makes of it."""

    def call(x: Tensor, m: Any) -> object:
        return forward(F.relu(m.bn(m.conv(x))), m)

    return Called(call, conv=nn.Conv2d(3, 8, 3, 2, 1), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 5), **parts)


def _gem(x: Tensor) -> Tensor:
    return F.avg_pool2d(x.clamp(min=1e-6).pow(3.0), (x.size(-2), x.size(-1))).pow(1 / 3)


def _attention(x: Tensor) -> Tensor:
    weights = x.flatten(2).mean(1, keepdim=True).softmax(-1)
    return torch.bmm(x.view(x.size(0), 8, -1), weights.transpose(1, 2)).squeeze()


def _cut_apart(x: Tensor, m: Any) -> Tensor:
    a, b = x.chunk(2, 1)
    c, d = torch.split(m.second(torch.cat([b, a], 1)), [3, 5], 1)
    x = torch.stack(torch.cat([c.abs(), (d - 0.5).abs()], 1).unbind(1)[::-1], 1).roll((1, 2), (2, 3))
    x = m.narrow(x[:, 1:5, ::2]).flip(3).repeat(1, 2, 1, 1)
    return m.fc(x.pow(2).sum((2, 3)).sqrt() + x.pow(2).sum((2, 3)).pow(0.5))


def _made_in_forward(x: Tensor, m: Any) -> Tensor:
    x = x - torch.tensor([0.1, 0.0, -0.1, 0.3] * 2).view(1, 8, 1, 1)
    x = x * torch.linspace(0.5, 1, x.shape[3]) + torch.arange(x.shape[2]).view(-1, 1) * 0.01
    x = torch.cat([m.second(x), x.new_zeros(x.size(0), 1, *x.shape[2:])], 1)[:, :8] * torch.ones_like(x) * 2
    return m.fc(x.mean((2, 3)) + torch.zeros(x.shape[0], 8))


def _of_every_rank(x: Tensor, m: Any) -> Tensor:
    y = x.mean((2, 3))
    gate = torch.sigmoid(m.line(y.unsqueeze(1)).squeeze(1))
    tokens = m.token(F.relu(m.up(x)).flatten(2).transpose(1, 2)).mean(1)
    return m.fc(y * gate + tokens)


SECOND: dict[str, nn.Module] = {"second": nn.Conv2d(8, 8, 3, 1, 1)}
FORWARDS: dict[str, tuple[Forward, dict[str, nn.Module]]] = {
    "view": (lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)), {}),
    "fixed pool": (lambda x, m: m.fc(F.avg_pool2d(x, x.shape[2]).view(x.shape[0], x.shape[1])), {}),
    "masked": (
        lambda x, m: m.fc(
            (x.flatten(2).masked_fill(x.flatten(2) < 0.2, -1e9).softmax(2) * x.clamp(max=1e6).flatten(2)).sum(2)
        ),
        {},
    ),
    "counted": (lambda x, m: m.fc(x.reshape(len(x), 8, -1).mean(2).view(int(x.size(0)), -1)), {}),
    "reshape": (lambda x, m: m.fc(F.adaptive_max_pool2d(x, 1).reshape(-1, 8)), {}),
    "squeeze": (lambda x, m: m.fc(F.normalize(x.mean((2, 3), keepdim=True).squeeze(), dim=1)), {}),
    "squeeze(0)": (lambda x, m: m.fc(x.mean(3).mean(2)).squeeze(0), {}),
    "generalised mean": (lambda x, m: m.fc(_gem(F.relu(m.second(x))).flatten(1)), SECOND),
    "attention": (lambda x, m: m.fc(_attention(x)), {}),
    "attention layer": (
        lambda x, m: m.fc(m.attend(*[x.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0].mean(1)),
        {"attend": nn.MultiheadAttention(8, 2, batch_first=True)},
    ),
    "largest": (lambda x, m: m.fc(x.flatten(2).max(-1)[0]), {}),
    "cut apart": (_cut_apart, {**SECOND, "narrow": nn.Conv2d(4, 4, 1)}),
    "made in forward": (_made_in_forward, SECOND),
    "float32 inside": (lambda x, m: m.fc(m.second(x.float()).float().mean((2, 3)).float()), SECOND),
    "of every rank": (
        _of_every_rank,
        {"line": nn.Conv1d(1, 1, 3, 1, 1), "up": nn.ConvTranspose2d(8, 8, 2, 2), "token": nn.Linear(8, 8)},
    ),
    "autocast": (lambda x, m: torch.autocast("cpu", dtype=torch.bfloat16)(lambda: m.fc(x.mean((2, 3))))(), {}),
}


@pytest.fixture(scope="module")
def images(pictures: Mapping[str, Tensor]) -> Tensor:
    return pictures["resnet8"]


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_that_people_write(name: str, images: Tensor) -> None:
    """In float32, and where the eager model may not run at all, every layer is checked, in every batch size."""
    forward, parts = FORWARDS[name]
    model = make(lambda: network(forward, **parts), images).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    subject = Fused(model, images)
    program = subject.program
    check_batches(program, {"input": images.numpy()})
    layers = sum(map(weighs, operator_nodes(program.master)))
    for precision in ("fp32", "fp16" if name == "masked" else "bf16"):
        p = PRECISIONS[precision]
        file = lower_onnx(program, p, {})
        for runner in (ProgramRunner(program, p, file.output_names), TracedOnnxRunner(file, p)):
            rung = judged(runner, subject, program, precision)
            assert rung, f"{precision} {runner.name}: {rung.verdict}"
            assert rung.operators is not None and len(rung.operators.checks) >= layers


Pair = namedtuple("Pair", "scores other")


@dataclasses.dataclass
class _Result:
    scores: Tensor
    loss: object = None
    hidden: tuple[Tensor, ...] = ()


class _Output(OrderedDict[str, Any]):
    """As the libraries of transformers return them."""


OUTPUTS: dict[str, tuple[Forward, str]] = {
    "None": (lambda y, m: (y, None), "output_0"),
    "others": (lambda y, m: {"scores": y, "n": 3, "name": "net", "on": True, "size": y.shape, "of": y.dtype}, "scores"),
    "dataclass": (lambda y, m: _Result(y, None, (y * 2, y + 1)), "scores hidden_0 hidden_1"),
    "namedtuple": (lambda y, m: Pair(y, None), "scores"),
    "mapping": (lambda y, m: _Output(scores=y, twice=y * 2), "scores twice"),
    "constant": (lambda y, m: {"scores": y, "again": y, "scale": m.fc.bias.exp()}, "scores again"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_more_than_tensors(name: str, images: Tensor) -> None:
    wrap, expected = OUTPUTS[name]
    model = make(lambda: network(lambda x, m: wrap(m.fc(x.mean((2, 3))), m)), images)
    subject = Fused(model, images)
    program = subject.program
    assert output_names(program.graph_module) == tuple(expected.split())
    assert name == "mapping" or any("not exported" in note for note in program.coverage.notes) or name == "dataclass"
    rung = judged(TracedOnnxRunner(subject.files["fp32"], FP32), subject, program, "fp32")
    assert rung and list(rung.outputs) == expected.split(), rung.verdict


def _nested(model: Any) -> nn.Module:
    model.conv = torch.compile(model.conv, backend="eager")
    return nn.DataParallel(model)


def _inference(model: Any) -> Any:
    with torch.inference_mode():
        made = copy.deepcopy(model)
        made.conv.weight = nn.Parameter(model.conv.weight.clone())
    return made


def _hooked(model: Any) -> Any:
    model.conv.register_forward_hook(lambda module, inputs, y: y * 2)
    model.derived = model.conv.weight * 2  # which no copy.deepcopy takes
    model.features = []
    model.conv.register_forward_hook(lambda module, inputs, y: model.features.append(y))
    return model


def _normalised(model: Any) -> Any:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.conv)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "compiled inside": _nested,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).eval(),
    "traced by fx": lambda model: torch.fx.GraphModule(model, torch.fx.Tracer().trace(model)).eval(),
    "inference mode": _inference,
    "hooks": _hooked,
    "weight_norm": _normalised,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_module_in_any_guise(name: str, images: Tensor) -> None:
    model = WRAPPERS[name](make(lambda: network(lambda x, m: m.fc(x.mean((2, 3)))), images))
    program, again = fuse(model, images, BATCH), fuse(model, images, BATCH)
    assert again.coverage == program.coverage
    assert "conv" in {operator.name for operator in program.coverage.fused}
    y = _run(EagerRunner(model, torch.float64, ("output",)), images)
    np.testing.assert_allclose(_run(ProgramRunner(program, FP32, ("output",)), images), y, rtol=0, atol=1e-5)


def _run(runner: Any, x: Tensor) -> NDArray[Any]:
    with runner:
        y: NDArray[Any] = runner.infer({"input": x[:5].numpy()})["output"]
        return y


BAD: dict[str, tuple[Forward, str]] = {
    "no batch": (lambda y, m: y.mean(), r"output has shape \[\]: expected \[batch, "),
    "first image": (lambda y, m: (y, y[0]), r"output_1 has shape \[5\]"),
    "another dimension": (lambda y, m: y.view(-1, 1), r"shape \[5\*batch, 1\]"),
    "over the batch": (lambda y, m: y.softmax(0), "depends on the other images"),
    "neighbours": (lambda y, m: y + y.flip(0), "depends on the other images"),
    "neighbours, faintly": (lambda y, m: y + 1e-7 * y.flip(0), "depends on the other images"),
    "fixed by view": (lambda y, m: y.view(4, -1), r"no other batch than 4 \(test_forwards.py, line \d+.*batch=4"),
    "one by one": (lambda y, m: torch.stack([row * 2 for row in y]), "takes the images of a batch one by one"),
    "fixed by zeros": (lambda y, m: y + torch.zeros(4, 5), "no other batch than 4"),
    "dropout": (lambda y, m: F.dropout(y), "draws random numbers .*training=self.training"),
    "an object": (lambda y, m: object(), "returns a object: expected tensors"),
    "nothing": (lambda y, m: None, "returns nothing"),
    "only constants": (lambda y, m: m.fc.bias, "returns nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_bundle_can_hold_is_refused_in_one_line(name: str, images: Tensor) -> None:
    wrap, expected = BAD[name]
    model = network(lambda x, m: wrap(m.fc(x.mean((2, 3))), m)).eval()
    with pytest.raises(ExportError, match=expected) as caught:
        check_batches(fuse(model, images, BATCH), {"input": images.numpy()})
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_models_and_examples_that_are_something_else(images: Tensor) -> None:
    scripted = nn.Sequential(torch.jit.trace(nn.Conv2d(3, 4, 3), images)).eval()
    with pytest.raises(ExportError, match=r"^0 is TorchScript.*state_dict"):
        fuse(scripted, images)
    with pytest.raises(ExportError, match="weight holds no values yet: call the model on an example"):
        fuse(nn.Sequential(nn.LazyConv2d(4, 3)).eval(), images)
    with pytest.raises(
        ExportError, match=r"torch.uint8: give it as the model is fed, .*; ExportConfig.input='uint8' is"
    ):
        fuse(network(lambda x, m: x).eval(), images.to(torch.uint8))


@pytest.mark.parametrize("size", [1, 4])
def test_one_size_alone(size: int, images: Tensor) -> None:
    """What fixes the batch is right for that size; a squeeze keeps the batch of one image."""
    model = make(lambda: network(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).squeeze())), images)
    for own in (model, network(lambda x, m: m.fc(x.mean((2, 3))).view(size, -1)).eval()):
        alone = Fused(own, images, Batch(size, size, size))
        check_batches(alone.program, {"input": images.numpy()})
        assert judged(TracedOnnxRunner(alone.files["fp32"], FP32), alone, alone.program, "fp32")


class _WrongIn(ProgramRunner):
    """Wrong in batches of one size."""

    wrong = 0

    def _run(self, inputs: Inputs) -> Arrays:
        wrong = len(inputs["input"]) == self.wrong
        return {name: y + 0.1 * wrong for name, y in super()._run(inputs).items()}


@pytest.mark.parametrize("wrong", [0, BATCH.minimum, BATCH.optimum, BATCH.maximum])
def test_every_size_that_matters_is_run(wrong: int, resnet8: Fused) -> None:
    assert {len(rows) for rows in mixed_rows(3, BATCH, BATCH.maximum)} == {BATCH.minimum, BATCH.optimum, BATCH.maximum}
    runner = _WrongIn(resnet8.program, FP32, ("output",))
    runner.wrong = wrong
    assert bool(_judged(runner, resnet8, resnet8.program)) == (wrong == 0)


def _judged(runner: Any, subject: Fused, program: FusedProgram) -> Rung:
    x = subject.images.numpy()[:12]
    references = run_references(subject.model, program, ("output",), {"input": x}, FP32)
    return judge(execute(runner, {"input": x}, program.batch), references, FP32, FP32.network_factor)
