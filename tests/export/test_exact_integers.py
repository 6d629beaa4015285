"""Whole networks of whole numbers: each form computes what the eager model does in integer arithmetic, bit for bit."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import kernels.launch
from export import FusedProgram, fuse
from export.base.precision import PRECISIONS, Precision
from export.fusion.nodes import FUSED_OPERATORS, deep_copy
from export.fusion.program import output_names
from export.lowering.kernel_engine import lower_kernels
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.runtime.engines.cuda_runtime import why_no_gpu
from export.runtime.engines.engine import FLAVOURS, build_engine, why_not_buildable
from export.runtime.engines.runner import KernelRunner, TensorRTRunner
from export.runtime.runner import Interface, Runner
from kernels.launch import target_of
from kernels.operators.registry import OPERATORS
from tests.effort import TIMES
from tests.export.networks import BATCH, values_of
from tests.export.zoo import SIZE, ZOO
from tests.kernels.launching import quick_config

# By precision: up to where its type holds every whole number, the weights of a filter that are not 0, and whether the
# network keeps its head, whose mean over up to 1024 pixels needs 10 bits more.
EXACT = {"fp32": (2**24, 8, True), "fp16": (2**11, 3, False), "bf16": (2**8, 2, False)}
BUILT = ("bottleneck", "unet")  # on a GPU by TensorRT too, which takes long
LOWERED = ("basic", "bottleneck")  # on a GPU to kernel engines too, which are compiled again
KINDS = ("basic", "bottleneck", "preact", "resnext", "repvgg", "iresnet", "densenet", "shufflenet", "mobilenet_v2",
         "ghostnet", "inception", "vgg", "unet", "fpn", "ssd", "option_a")  # fmt: skip
FULL = 4  # every how many kinds are tried in every precision; on a GPU and with TEST_TIMES above 1 all are
TRIALS = [
    pytest.param(name, precision, device, marks=[pytest.mark.gpu] * (device == "cuda"))
    for device in ("cpu", "cuda")
    for i, name in enumerate(KINDS)
    for j, precision in enumerate(EXACT)
    if device == "cuda" or TIMES > 1 or i % FULL == 0 or i % len(EXACT) == j
]


def whole(name: str, terms: int, head: bool) -> nn.Module:
    """One of the zoo whose weights are -1, 0 and 1, and whose BatchNorm turns signs and shifts by whole numbers."""
    torch.manual_seed(0)
    model: Any = ZOO[name]()
    if not head and isinstance(model, nn.Sequential):
        model = model[:-1]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 2.0**-8  # with its variance 1 in all types; PyTorch before 2.11 takes no 0
            module.running_var = torch.full_like(module.bias, 1 - module.eps)
            module.weight.data = torch.randint(0, 2, module.weight.shape) * 2.0 - 1
            module.running_mean = torch.randint(-1, 2, module.bias.shape).float()
            module.bias.data = torch.randint(-1, 2, module.bias.shape).float()
        elif isinstance(module, nn.PReLU):
            module.weight.data = torch.randint(-1, 2, module.weight.shape).float()
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            order = torch.rand(module.weight.shape).flatten(1).argsort(1).argsort(1).reshape(module.weight.shape)
            signs = torch.randint(0, 2, module.weight.shape) * 2.0 - 1
            module.weight.data = torch.where(order < terms, signs, 0)
            if module.bias is not None:
                module.bias.data = torch.randint(-1, 2, module.bias.shape).float()
    return model.eval().requires_grad_(False)


def by_triton(program: FusedProgram, precision: str, names: tuple[str, ...]) -> Runner:
    """The fused operators by their kernels in the interpreter."""

    def launched(operator: str, *arguments: Any) -> Tensor:
        config = quick_config(OPERATORS[operator].of(*arguments).problem())
        return kernels.launch.run(operator, *arguments, config=config)

    operators = {operator: partial(launched, operator._opname) for operator in FUSED_OPERATORS}
    return ProgramRunner(program, PRECISIONS[precision], names, operators=operators)


def engines(program: FusedProgram, file: OnnxFile, precision: Precision) -> list[Runner]:
    """An engine of each package that this machine's GPU has."""
    found: list[Runner] = []
    for flavour in FLAVOURS.values():
        if not why_not_buildable(flavour) and not why_no_gpu(flavour.name):
            engine = build_engine(file.serialize(), flavour, precision, BATCH, program.inputs)
            found.append(TensorRTRunner(engine, Interface.of(file.output_names, program.inputs, BATCH)))
    return found


@pytest.mark.parametrize(("name", "precision", "device"), TRIALS)
def test_every_form_agrees_with_integer_arithmetic(name: str, precision: str, device: str) -> None:
    """On a GPU the graphs of Triton kernels, elsewhere the same kernels in the interpreter."""
    limit, terms, head = EXACT[precision]
    model, p = whole(name, terms, head), PRECISIONS[precision]
    images = torch.randint(-2, 3, (2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).float()
    program = fuse(model, images, BATCH)
    names = output_names(program.graph_module)
    for value in values_of(deep_copy(program.source).double(), images.double()).values():
        assert value.abs().max() <= limit and bool((1024 * value % 1 == 0).all())
    expected = [y.float().numpy() for y in pytree.tree_leaves(model.double()(images.double()))]
    model.float()
    assert all((y != 0).mean() > 0.1 and y.std() > 0 for y in expected)
    file = lower_onnx(program, p, {})
    forms: list[Runner] = [ProgramRunner(program, p, names, device=device)]
    if device == "cuda":
        forms += engines(program, file, p) if name in BUILT else []
        if name in LOWERED and find_spec("cuda"):
            engine = lower_kernels(program, p, target_of(torch.device("cuda")), BATCH)
            forms.append(KernelRunner(engine.content, Interface.of(names, program.inputs, BATCH)))
    else:
        forms.append(TracedOnnxRunner(file, p))
        forms += [] if torch.cuda.is_available() else [by_triton(program, precision, names)]
    for form in forms:
        with form:
            got = form.infer({"input": images.numpy()})
        for output, y in zip(names, expected, strict=True):
            assert (got[output] == y).all(), (form.name, output)
