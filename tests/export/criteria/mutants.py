"""Defects made on purpose: each breaks a correct candidate in one place, and every one must be refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from kernels.operators.registry import OPERATORS, Arguments

Operator = Callable[..., Tensor]
CONV = resnet_deploy.conv2d_bias_act.default
PROJECTION = resnet_deploy.conv2d_projection_bias_act.default
BOTTLENECK = resnet_deploy.conv2d_conv1x1_bias_act.default
STEM = resnet_deploy.conv2d_bias_relu_maxpool.default
HEAD = resnet_deploy.mean_linear.default


def _correct(arguments: type[Arguments[Any]]) -> Operator:
    return lambda *values: arguments.of(*values).reference()


CORRECT = {getattr(resnet_deploy, name).default: _correct(arguments) for name, arguments in OPERATORS.items()}


@dataclass(frozen=True)
class Mutant:
    """A defect in one call of one operator.

    Attributes:
        operator: what is broken.
        defect: computes it wrongly, from the same arguments.
        applies: whether a call, given its arguments by name, is one the defect shows in.
    """

    operator: Any
    defect: Operator
    applies: Callable[[Mapping[str, Any]], bool] = lambda arguments: True

    def operators(self, program: FusedProgram) -> dict[Any, Operator]:
        """For `ProgramRunner`: the defect in one call in the middle of those it applies to, known by its weight."""
        calls = [n for n in program.master.graph.nodes if is_call(n, self.operator)]
        victims = [i for i, n in enumerate(calls) if self.applies(named_args(n))]
        assert victims, "the network has no such call"
        victim, weights = victims[len(victims) // 2], []

        def operator(*args):  # type: ignore[no-untyped-def]
            weight = args[1].data_ptr()
            if weight not in weights:
                weights.append(weight)
            return (self.defect if weights.index(weight) == victim else CORRECT[self.operator])(*args)

        return {self.operator: operator}


def changing(operator: Any, argument: str, change: Callable[[Tensor], Tensor | None]) -> Operator:
    """The operator with one argument changed."""
    index = [a.name for a in operator._schema.arguments].index(argument)

    def defect(*args):  # type: ignore[no-untyped-def]
        return CORRECT[operator](*args[:index], change(args[index]), *args[index + 1 :])

    return defect


def after(operator: Any, change: Callable[[Tensor], Tensor]) -> Operator:
    """The operator with its result changed."""
    return lambda *args: change(CORRECT[operator](*args).clone())


def bf16_arithmetic(operator: Any) -> Operator:
    def defect(x, *rest):  # type: ignore[no-untyped-def]
        narrow = [a.bfloat16() if isinstance(a, Tensor) else a for a in (x, *rest)]
        return CORRECT[operator](*narrow).to(x.dtype)

    return defect


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
    kept[(slice(None), slice(-max(1, weight.shape[1] // 16), None), *[-1] * (weight.dim() - 2))] = 0
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


def dropped(value: Tensor) -> None:
    return None


def edge_padding(operator: Any) -> Operator:
    """The operator padded with the value at the edge."""
    names = [a.name for a in operator._schema.arguments]

    def defect(x, *rest):  # type: ignore[no-untyped-def]
        arguments = dict(zip(names, (x, *rest), strict=True))
        bottom, right = arguments["padding"]
        padded = F.pad(x, (right, right, bottom, bottom), mode="replicate")
        arguments |= {"x": _channels_last(padded), "padding": (0, 0)}
        return CORRECT[operator](*arguments.values())

    return defect


def _channels_last(y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y.contiguous()


def _narrow(x: Tensor) -> torch.dtype:
    return torch.float16 if x.dtype == torch.float32 else x.dtype


def _narrow_products(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    """A convolution summed up, a few products at a time, in the storage type (float16 where that is float32)."""
    total = None
    for tap in range(weight.shape[2] * weight.shape[3]):
        for start in range(0, weight.shape[1], 4):
            r, s = divmod(tap, weight.shape[3])
            part = torch.zeros_like(weight)
            part[:, start : start + 4, r, s] = weight[:, start : start + 4, r, s]
            product = F.conv2d(x.float(), part.float(), None, *geometry).to(_narrow(x))
            total = product if total is None else total + product
    assert total is not None
    return total.float()


def _finished(total: Tensor, bias: Tensor, relu: bool) -> Tensor:
    y = total + bias.float()[:, None, None]
    return _channels_last((y.relu() if relu else y).to(bias.dtype))


def narrow_conv(x, weight, bias, residual, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    total = _narrow_products(x, weight, stride, padding, dilation, groups)
    return _finished(total + (0 if residual is None else residual.float()), bias, relu)


def narrow_projection(  # type: ignore[no-untyped-def]
    x, weight, bias, shortcut, shortcut_weight, stride, padding, dilation, shortcut_stride, relu
):
    total = _narrow_products(x, weight, stride, padding, dilation)
    return _finished(total + _narrow_products(shortcut, shortcut_weight, shortcut_stride), bias, relu)


def narrow_stem(x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
    h = _finished(_narrow_products(x, weight, stride, padding), bias, True)
    return _channels_last(F.max_pool2d(h, 3, 2, 1))


def narrow_head(x, weight, bias):  # type: ignore[no-untyped-def]
    mean, total = x.float().mean((2, 3)).to(x.dtype), bias.to(_narrow(x))
    for k in range(weight.shape[1]):
        total = total + (mean[:, k : k + 1].float() * weight[:, k].float()).to(_narrow(x))
    return total.to(x.dtype)


def relu_before_addition(x, weight, bias, residual, *geometry_relu):  # type: ignore[no-untyped-def]
    y = CORRECT[CONV](x, weight, bias, None, *geometry_relu)
    return _channels_last(y + residual)


def relu_before_projection(  # type: ignore[no-untyped-def]
    x, weight, bias, shortcut, shortcut_weight, stride, padding, dilation, shortcut_stride, relu
):
    y = CORRECT[CONV](x, weight, bias, None, stride, padding, dilation, 1, relu)
    return _channels_last(y + F.conv2d(shortcut.float(), shortcut_weight.float(), None, shortcut_stride).to(y.dtype))


def with_intermediate(change: Callable[[Tensor], Tensor], relu: bool = True) -> Operator:
    """A bottleneck whose intermediate tensor is changed, or lacks its ReLU."""

    def defect(  # type: ignore[no-untyped-def]
        x, weight, bias, expand, expand_bias, shortcut, projection, stride, padding, dilation, shortcut_stride, act
    ):
        h = change(CORRECT[CONV](x, weight, bias, None, stride, padding, dilation, 1, relu))
        plain = ((1, 1), (0, 0), (1, 1))
        if projection is None:
            return CORRECT[CONV](h, expand, expand_bias, shortcut, *plain, 1, act)
        return CORRECT[PROJECTION](h, expand, expand_bias, shortcut, projection, *plain, shortcut_stride, act)

    return defect


def narrow_bottleneck(  # type: ignore[no-untyped-def]
    x, weight, bias, expand, expand_bias, shortcut, projection, stride, padding, dilation, shortcut_stride, act
):
    h = narrow_conv(x, weight, bias, None, stride, padding, dilation, 1, True)
    return narrow_conv(h, expand, expand_bias, shortcut, (1, 1), (0, 0), (1, 1), 1, act)


def stem_with_pool(pool: Callable[[Tensor], Tensor]) -> Operator:
    def defect(x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
        return _channels_last(pool(CORRECT[CONV](x, weight, bias, None, stride, padding, (1, 1), 1, True)))

    return defect


def pool_beyond_the_border(x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
    """Takes for -inf, outside of the feature map, what the convolution would give there."""
    wider = [p + s for p, s in zip(padding, stride, strict=True)]
    h = CORRECT[CONV](x, weight, bias, None, stride, wider, (1, 1), 1, True)
    return _channels_last(F.max_pool2d(h, 3, 2)[:, :, : (h.shape[2] - 1) // 2, : (h.shape[3] - 1) // 2])


def zeros_around_the_pool(x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
    """Pools before bias and ReLU, where padding with 0 is not padding with -inf."""
    products = F.conv2d(x.float(), weight.float(), None, stride, padding)
    return _finished(F.max_pool2d(F.pad(products, (1, 1, 1, 1)), 3, 2), bias, True)


def stem_without_relu(x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
    h = CORRECT[CONV](x, weight, bias, None, stride, padding, (1, 1), 1, False)
    return _channels_last(F.max_pool2d(h, 3, 2, 1))


def head_with_mean(change: Callable[[Tensor], Tensor]) -> Operator:
    """A head whose mean, made by `change` from the float32 features, is a wrong one."""
    return lambda x, weight, bias: F.linear(change(x.float()), weight.float(), bias.float()).to(x.dtype)


def wrong_count(x: Tensor) -> Tensor:
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3] - 1)


def without_last_pixel(x: Tensor) -> Tensor:
    return x.flatten(2)[:, :, :-1].sum(2) / (x.shape[2] * x.shape[3])


def adds(arguments: Mapping[str, Any]) -> bool:
    return arguments["residual"] is not None


def strides(arguments: Mapping[str, Any]) -> bool:
    return max(arguments["stride"]) > 1


def pads(arguments: Mapping[str, Any]) -> bool:
    return max(arguments["padding"]) > 0


def has_identity(arguments: Mapping[str, Any]) -> bool:
    return arguments["shortcut"] is not None and arguments["shortcut_weight"] is None


def projects(arguments: Mapping[str, Any]) -> bool:
    return arguments["shortcut_weight"] is not None


def projects_with_stride(arguments: Mapping[str, Any]) -> bool:
    return projects(arguments) and max(arguments["shortcut_stride"]) > 1


def common(operator: Any) -> dict[str, Mutant]:
    """What can go wrong in any of the operators."""
    defects = {
        "two channels swapped": after(operator, swapped_channels),
        "last K slice lost": changing(operator, "weight", without_last_k_slice),
        "bias dropped": changing(operator, "bias", torch.zeros_like),
        "one operator returns zeros": after(operator, torch.zeros_like),
        "NaN in one lane": after(operator, nan_lane),
        "bfloat16 arithmetic": bf16_arithmetic(operator),
    }
    if operator is not HEAD:
        defects["one corner pixel wrong"] = after(operator, corner_pixel)
    return {name: Mutant(operator, defect) for name, defect in defects.items()}


def convolution(operator: Any) -> dict[str, Mutant]:
    """What can go wrong in any convolution larger than 1x1."""
    return {
        "padding with the edge value": Mutant(operator, edge_padding(operator), pads),
        "one tap transposed": Mutant(operator, changing(operator, "weight", transposed_tap), pads),
        "stride-2 phase off by one": Mutant(operator, changing(operator, "x", shifted), strides),
    }


MUTANTS: dict[Any, dict[str, Mutant]] = {
    CONV: {
        **common(CONV),
        **convolution(CONV),
        "narrow accumulation": Mutant(CONV, narrow_conv, pads),
        "relu before the addition": Mutant(CONV, relu_before_addition, adds),
        "residual dropped": Mutant(CONV, changing(CONV, "residual", dropped), adds),
    },
    PROJECTION: {
        **common(PROJECTION),
        "narrow accumulation": Mutant(PROJECTION, narrow_projection),
        "padding with the edge value": Mutant(PROJECTION, edge_padding(PROJECTION)),
        "relu before the addition": Mutant(PROJECTION, relu_before_projection),
        "projection dropped": Mutant(PROJECTION, changing(PROJECTION, "shortcut_weight", torch.zeros_like)),
        "last K slice of the projection lost": Mutant(
            PROJECTION, changing(PROJECTION, "shortcut_weight", without_last_k_slice)
        ),
        "projection's stride phase off by one": Mutant(PROJECTION, changing(PROJECTION, "shortcut", shifted)),
        "shortcut of another image": Mutant(PROJECTION, changing(PROJECTION, "shortcut", another_image)),
    },
    BOTTLENECK: {
        **common(BOTTLENECK),
        **convolution(BOTTLENECK),
        "narrow accumulation": Mutant(BOTTLENECK, narrow_bottleneck, has_identity),
        "intermediate ReLU dropped": Mutant(BOTTLENECK, with_intermediate(lambda h: h, relu=False)),
        "intermediate channels swapped": Mutant(BOTTLENECK, with_intermediate(swapped_channels)),
        "intermediate tile off by one pixel": Mutant(BOTTLENECK, with_intermediate(shifted)),
        "last K slice of the expansion lost": Mutant(
            BOTTLENECK, changing(BOTTLENECK, "expand_weight", without_last_k_slice)
        ),
        "expansion's bias dropped": Mutant(BOTTLENECK, changing(BOTTLENECK, "expand_bias", torch.zeros_like)),
        "shortcut dropped": Mutant(BOTTLENECK, changing(BOTTLENECK, "shortcut", dropped), has_identity),
        "shortcut of another image": Mutant(BOTTLENECK, changing(BOTTLENECK, "shortcut", another_image)),
        "projection dropped": Mutant(BOTTLENECK, changing(BOTTLENECK, "shortcut_weight", torch.zeros_like), projects),
        "projection's stride phase off by one": Mutant(
            BOTTLENECK, changing(BOTTLENECK, "shortcut", shifted), projects_with_stride
        ),
    },
    STEM: {
        **common(STEM),
        **convolution(STEM),
        "narrow accumulation": Mutant(STEM, narrow_stem),
        "ReLU dropped": Mutant(STEM, stem_without_relu),
        "pool's window off by one": Mutant(STEM, stem_with_pool(lambda h: F.max_pool2d(F.pad(h, (0, 2, 0, 2)), 3, 2))),
        "pool's window of 2": Mutant(STEM, stem_with_pool(lambda h: F.max_pool2d(h, 2, 2))),
        "pool reads beyond the border": Mutant(STEM, pool_beyond_the_border),
        "pool padded with 0 before bias and ReLU": Mutant(STEM, zeros_around_the_pool),
    },
    HEAD: {
        **common(HEAD),
        "narrow accumulation": Mutant(HEAD, narrow_head),
        "mean over a wrong count": Mutant(HEAD, head_with_mean(wrong_count)),
        "mean without the last pixel": Mutant(HEAD, head_with_mean(without_last_pixel)),
    },
}


class ConstantLogits(ProgramRunner):
    """Answers every image with the first image's logits."""

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        return {name: np.repeat(y[:1], len(y), axis=0) for name, y in super().infer(inputs).items()}


class AllZeros(ProgramRunner):
    """Never writes its output."""

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        return {name: np.zeros_like(y) for name, y in super().infer(inputs).items()}


class StaleOutput(ProgramRunner):
    """Returns what the batch before this one gave."""

    previous: Arrays | None = None

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        outputs = super().infer(inputs)
        stale = self.previous or outputs
        self.previous = outputs
        return {name: np.resize(stale[name], y.shape) for name, y in outputs.items()}


class WritesItsInput(ProgramRunner):
    """Normalises its input in place."""

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        outputs = super().infer(inputs)
        np.multiply(inputs["input"], 0.5, out=inputs["input"])
        return outputs


RUNNERS: dict[str, type[ProgramRunner]] = {
    "constant logits": ConstantLogits,
    "all zeros": AllZeros,
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
    with plain_torch():
        for apply in FOLDING:
            graph_module = apply(graph_module)
    return _fused(program, graph_module)


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


def _fused(program: FusedProgram, folded: fx.GraphModule) -> FusedProgram:
    master = folded
    with plain_torch():
        for apply in LEVELS[DEFAULT_LEVEL]:
            master = apply(master)
    return FusedProgram(program.source, program.folded, master, program.batch)


PROGRAMS: dict[str, Callable[[FusedProgram], FusedProgram]] = {
    "wrong BatchNorm epsilon": with_wrong_epsilon,
    "projection's bias dropped": without_projection_bias,
}
