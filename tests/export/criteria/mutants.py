"""Defects made on purpose: each breaks a correct candidate in one place, and every one must be refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from export.base.batch import Arrays
from export.fusion.capture import plain_torch
from export.fusion.nodes import args_of, aten, duplicate, is_call, module_path, named_args, resnet_deploy, same_shape
from export.fusion.passes import DEFAULT_LEVEL, FOLDING, LEVELS
from export.fusion.program import FusedProgram
from export.lowering.runners import ProgramRunner
from kernels.operators.registry import OPERATORS

Arguments = SimpleNamespace  # of a call, by the names of its schema
Defect = Callable[[Arguments], Tensor]
CONV = resnet_deploy.conv2d_bias_act.default
PROJECTION = resnet_deploy.conv2d_projection_bias_act.default
BOTTLENECK = resnet_deploy.conv2d_conv1x1_bias_act.default
STEM = resnet_deploy.conv2d_bias_relu_maxpool.default
HEAD = resnet_deploy.mean_linear.default


@dataclass(frozen=True)
class Mutant:
    """A defect in one call of one operator, computed from the same arguments; `applies` says whether it shows there."""

    operator: Any
    defect: Defect
    applies: Callable[[Arguments], bool] = lambda a: True

    def operators(self, program: FusedProgram) -> dict[Any, Callable[..., Tensor]]:
        """For `ProgramRunner`: the defect in one call in the middle of those it applies to, known by its weight."""
        calls = [n for n in program.master.graph.nodes if is_call(n, self.operator)]
        victims = [i for i, n in enumerate(calls) if self.applies(Arguments(**named_args(n)))]
        assert victims, "the network has no such call"
        victim, weights = victims[len(victims) // 2], list[int]()
        names = [argument.name for argument in self.operator._schema.arguments]

        def operator(*args: Any) -> Tensor:
            weight = args[1].data_ptr()
            if weight not in weights:
                weights.append(weight)
            if weights.index(weight) != victim:
                return reference(self.operator, *args)
            return self.defect(Arguments(**dict(zip(names, args, strict=True))))

        return {self.operator: operator}


def reference(operator: Any, *arguments: Any) -> Tensor:
    return OPERATORS[operator._opname].of(*arguments).reference()


def correct(operator: Any, a: Arguments, **changes: Any) -> Tensor:
    """The operator with some arguments changed."""
    return reference(operator, *(vars(a) | changes).values())


def changing(operator: Any, argument: str, change: Callable[[Tensor], Tensor | None]) -> Defect:
    return lambda a: correct(operator, a, **{argument: change(getattr(a, argument))})


def after(operator: Any, change: Callable[[Tensor], Tensor]) -> Defect:
    """The operator with its result changed."""
    return lambda a: change(correct(operator, a).clone())


def bf16_arithmetic(operator: Any, a: Arguments) -> Tensor:
    narrow = {name: value.bfloat16() for name, value in vars(a).items() if isinstance(value, Tensor)}
    return correct(operator, a, **narrow).to(a.x.dtype)


def swapped_channels(y: Tensor) -> Tensor:
    return _channels_last(y[:, [1, 0, *range(2, y.shape[1])]])


def nan_lane(y: Tensor) -> Tensor:
    y[(0,) * y.dim()] = float("nan")
    return y


def corner_pixel(y: Tensor) -> Tensor:
    y[0, :, -1, -1] = y[0, :, -1, -2]
    return y


def without_last_k_slice(weight: Tensor) -> Tensor:
    kept = weight.clone()
    last = slice(-max(1, weight.shape[1] // 16), None)
    index: tuple[int | slice, ...] = (slice(None), last, *[-1] * (weight.dim() - 2))
    kept[index] = 0
    return kept


def transposed_tap(weight: Tensor) -> Tensor:
    changed = weight.clone()
    changed[:, :, 0, 1], changed[:, :, 1, 0] = weight[:, :, 1, 0], weight[:, :, 0, 1]
    return changed


def shifted(x: Tensor) -> Tensor:
    """One pixel later: the other phase of a stride."""
    return _channels_last(F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:])


def another_image(x: Tensor) -> Tensor:
    return _channels_last(x.roll(1, 0))


def edge_padding(operator: Any, a: Arguments) -> Tensor:
    """The operator padded with the value at the edge."""
    bottom, right = a.padding
    padded = F.pad(a.x, (right, right, bottom, bottom), mode="replicate")
    return correct(operator, a, x=_channels_last(padded), padding=(0, 0))


def _channels_last(y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y.contiguous()


def _finished(total: Tensor, bias: Tensor, relu: bool) -> Tensor:
    y = total + bias.float()[:, None, None]
    return _channels_last((y.relu() if relu else y).to(bias.dtype))


def narrow_accumulation(operator: Any, a: Arguments) -> Tensor:
    """The operator with sums of a few products at a time in the storage type (float16 where that is float32)."""
    narrow = torch.float16 if a.x.dtype == torch.float32 else a.x.dtype
    conv2d = F.conv2d

    def narrow_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> Tensor:
        total = torch.zeros((), dtype=narrow)
        for tap in range(weight.shape[2] * weight.shape[3]):
            for start in range(0, weight.shape[1], 4):
                r, s = divmod(tap, weight.shape[3])
                part = torch.zeros_like(weight)
                part[:, start : start + 4, r, s] = weight[:, start : start + 4, r, s]
                total = total + conv2d(x, part, None, *geometry).to(narrow)
        return total.float() if bias is None else total.float() + bias[:, None, None]

    def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return narrow_conv2d(x[:, :, None, None], weight[:, :, None, None], bias).flatten(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", narrow_conv2d)
        patch.setattr(F, "linear", narrow_linear)
        return correct(operator, a)


def convolved(a: Arguments, relu: bool, **changes: Any) -> Tensor:
    """The first convolution of any of the operators alone, without a residual."""
    b = Arguments(**{"dilation": (1, 1), "groups": 1} | vars(a) | changes)
    return reference(CONV, b.x, b.weight, b.bias, None, b.stride, b.padding, b.dilation, b.groups, relu)


def relu_before_addition(a: Arguments) -> Tensor:
    return _channels_last(convolved(a, a.relu) + a.residual)


def relu_before_projection(a: Arguments) -> Tensor:
    y = convolved(a, a.relu)
    shortcut = F.conv2d(a.shortcut.float(), a.shortcut_weight.float(), None, a.shortcut_stride)
    return _channels_last(y + shortcut.to(y.dtype))


def with_intermediate(change: Callable[[Tensor], Tensor], relu: bool = True) -> Defect:
    """A bottleneck whose intermediate tensor is changed, or lacks its ReLU."""

    def defect(a: Arguments) -> Tensor:
        first = change(convolved(a, relu)), a.expand_weight, a.expand_bias, a.shortcut
        plain = (1, 1), (0, 0), (1, 1)
        if a.shortcut_weight is None:
            return reference(CONV, *first, *plain, 1, a.relu)
        return reference(PROJECTION, *first, a.shortcut_weight, *plain, a.shortcut_stride, a.relu)

    return defect


def stem_with_pool(pool: Callable[[Tensor], Tensor], relu: bool = True) -> Defect:
    return lambda a: _channels_last(pool(convolved(a, relu)))


def pool_beyond_the_border(a: Arguments) -> Tensor:
    """Takes for -inf, outside of the feature map, what the convolution would give there."""
    h = convolved(a, True, padding=[p + s for p, s in zip(a.padding, a.stride, strict=True)])
    return _channels_last(F.max_pool2d(h, 3, 2)[:, :, : (h.shape[2] - 1) // 2, : (h.shape[3] - 1) // 2])


def zeros_around_the_pool(a: Arguments) -> Tensor:
    """Pools before bias and ReLU, where padding with 0 is not padding with -inf."""
    products = F.conv2d(a.x.float(), a.weight.float(), None, a.stride, a.padding)
    return _finished(F.max_pool2d(F.pad(products, (1, 1, 1, 1)), 3, 2), a.bias, True)


def head_with_mean(change: Callable[[Tensor], Tensor]) -> Defect:
    """A head whose mean, made by `change` from the float32 features, is a wrong one."""
    return lambda a: F.linear(change(a.x.float()), a.weight.float(), a.bias.float()).to(a.x.dtype)


def adds(a: Arguments) -> bool:
    return a.residual is not None


def pads(a: Arguments) -> bool:
    return max(a.padding) > 0


def projects(a: Arguments) -> bool:
    return a.shortcut_weight is not None


Planted = Defect | tuple[Defect, Callable[[Arguments], bool]]


def mutants(operator: Any, defects: Mapping[str, Planted]) -> dict[str, Mutant]:
    """By name; what goes wrong in any operator, in any convolution larger than 1x1, and in this one."""
    found: dict[str, Planted] = {
        "two channels swapped": after(operator, swapped_channels),
        "last K slice lost": changing(operator, "weight", without_last_k_slice),
        "bias dropped": changing(operator, "bias", torch.zeros_like),
        "one operator returns zeros": after(operator, torch.zeros_like),
        "NaN in one lane": after(operator, nan_lane),
        "bfloat16 arithmetic": partial(bf16_arithmetic, operator),
        "narrow accumulation": (partial(narrow_accumulation, operator), lambda a: operator is HEAD or pads(a)),
    }
    if operator is not HEAD:
        found["one corner pixel wrong"] = after(operator, corner_pixel)
        found["padding with the edge value"] = partial(edge_padding, operator), pads
    if operator in (CONV, BOTTLENECK, STEM):
        found["one tap transposed"] = changing(operator, "weight", transposed_tap), pads
        found["stride-2 phase off by one"] = changing(operator, "x", shifted), lambda a: max(a.stride) > 1
    found |= defects
    return {name: Mutant(operator, *(d if isinstance(d, tuple) else (d,))) for name, d in found.items()}


OWN: dict[Any, dict[str, Planted]] = {
    CONV: {
        "relu before the addition": (relu_before_addition, adds),
        "residual dropped": (changing(CONV, "residual", lambda _: None), adds),
    },
    PROJECTION: {
        "relu before the addition": relu_before_projection,
        "projection dropped": changing(PROJECTION, "shortcut_weight", torch.zeros_like),
        "last K slice of the projection lost": changing(PROJECTION, "shortcut_weight", without_last_k_slice),
        "projection's stride phase off by one": changing(PROJECTION, "shortcut", shifted),
        "shortcut of another image": changing(PROJECTION, "shortcut", another_image),
    },
    BOTTLENECK: {
        "intermediate ReLU dropped": with_intermediate(lambda h: h, relu=False),
        "intermediate channels swapped": with_intermediate(swapped_channels),
        "intermediate tile off by one pixel": with_intermediate(shifted),
        "last K slice of the expansion lost": changing(BOTTLENECK, "expand_weight", without_last_k_slice),
        "expansion's bias dropped": changing(BOTTLENECK, "expand_bias", torch.zeros_like),
        "shortcut dropped": (
            changing(BOTTLENECK, "shortcut", lambda _: None),
            lambda a: not projects(a) and a.shortcut is not None,
        ),
        "shortcut of another image": changing(BOTTLENECK, "shortcut", another_image),
        "projection dropped": (changing(BOTTLENECK, "shortcut_weight", torch.zeros_like), projects),
        "projection's stride phase off by one": (
            changing(BOTTLENECK, "shortcut", shifted),
            lambda a: projects(a) and max(a.shortcut_stride) > 1,
        ),
    },
    STEM: {
        "ReLU dropped": stem_with_pool(lambda h: F.max_pool2d(h, 3, 2, 1), relu=False),
        "pool's window off by one": stem_with_pool(lambda h: F.max_pool2d(F.pad(h, (0, 2, 0, 2)), 3, 2)),
        "pool's window of 2": stem_with_pool(lambda h: F.max_pool2d(h, 2, 2)),
        "pool reads beyond the border": pool_beyond_the_border,
        "pool padded with 0 before bias and ReLU": zeros_around_the_pool,
    },
    HEAD: {
        "mean over a wrong count": head_with_mean(lambda x: x.sum((2, 3)) / (x[0, 0].numel() - 1)),
        "mean without the last pixel": head_with_mean(lambda x: x.flatten(2)[:, :, :-1].sum(2) / x[0, 0].numel()),
    },
}
MUTANTS = {operator: mutants(operator, defects) for operator, defects in OWN.items()}


def answering(change: Callable[[NDArray], NDArray]) -> type[ProgramRunner]:
    """A runner that returns something else than what it computed."""

    class Answering(ProgramRunner):
        def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
            return {name: change(y) for name, y in super().infer(inputs).items()}

    return Answering


class StaleOutput(ProgramRunner):
    """Returns what the batch before this one gave."""

    previous: Arrays | None = None

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        outputs = super().infer(inputs)
        stale, self.previous = self.previous or outputs, outputs
        return {name: np.resize(stale[name], y.shape) for name, y in outputs.items()}


class WritesItsInput(ProgramRunner):
    """Normalises its input in place."""

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        outputs = super().infer(inputs)
        np.multiply(inputs["input"], 0.5, out=inputs["input"])
        return outputs


RUNNERS: dict[str, type[ProgramRunner]] = {
    "constant logits": answering(lambda y: np.repeat(y[:1], len(y), axis=0)),
    "all zeros": answering(np.zeros_like),
    "stale output of the previous batch": StaleOutput,
    "input written to": WritesItsInput,
}


def with_wrong_epsilon(program: FusedProgram) -> FusedProgram:
    """Folded with eps = 1e-3 in place of 1e-5; checked against the right captured graph."""
    graph_module: fx.GraphModule = duplicate(program.source)
    for node in graph_module.graph.nodes:
        if is_call(node, aten._native_batch_norm_legit_no_training.default):
            node.args = (*args_of(node)[:6], 1e-3)
    graph_module.recompile()
    return _fused(program, graph_module, (*FOLDING, *LEVELS[DEFAULT_LEVEL]))


def without_projection_bias(program: FusedProgram) -> FusedProgram:
    """Every projection merged without its bias."""
    graph_module = duplicate(program.folded)
    for node in graph_module.graph.nodes:
        if is_call(node, aten.conv2d.default) and module_path(node).endswith("downsample.0"):
            node.args = (*args_of(node)[:2], None, *args_of(node)[3:])
    return _fused(program, graph_module)


def with_shortcut_from_the_branch(program: FusedProgram) -> FusedProgram:
    """The first shortcut that can be is taken after the block's first convolution, not before it."""
    graph_module = duplicate(program.master)
    arguments = [named_args(n) for n in graph_module.graph.nodes if is_call(n, PROJECTION, BOTTLENECK)]
    x, shortcut = next((a["x"], a["shortcut"]) for a in arguments if same_shape(a["x"], a["shortcut"]))
    next(iter(x.users)).replace_input_with(shortcut, x)
    graph_module.recompile()
    return FusedProgram(program.source, program.folded, graph_module, program.batch)


def _fused(
    program: FusedProgram, master: fx.GraphModule, passes: Iterable[Any] = LEVELS[DEFAULT_LEVEL]
) -> FusedProgram:
    with plain_torch():
        for apply in passes:
            master = apply(master)
    return FusedProgram(program.source, program.folded, master, program.batch)


PROGRAMS: dict[str, Callable[[FusedProgram], FusedProgram]] = {
    "wrong BatchNorm epsilon": with_wrong_epsilon,
    "projection's bias dropped": without_projection_bias,
}
