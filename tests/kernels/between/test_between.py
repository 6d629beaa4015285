"""What lies between fused operators: the kernels, in Triton's interpreter, against torch's own operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.between.elementwise import ElementwiseProblem
from kernels.between.pooling import PoolProblem
from kernels.configs.config import KernelLaunch
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS
from kernels.launch import Workspace, launch_arguments
from kernels.oracle import Deviation
from kernels.plan import kernel_of

TARGET = TARGETS["sm_87"]


def interpreted(launch: KernelLaunch, tensors: dict[str, Tensor]) -> Tensor:
    """y of a launch that USE_PDL does not concern, its memory poisoned before."""
    tensors["y"].fill_(torch.nan)
    arguments = launch_arguments(launch, dict(tensors), Workspace("cpu"))
    kernel_of(launch)[launch.grid](**arguments, **launch.scalars, **launch.options)
    return tensors["y"]


def picture(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def whole(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


ELEMENTWISE: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Any], Callable[..., Tensor]]] = {
    "pixels last to first, and to float16": (
        lambda: {"a": torch.randn(2, 3, 5, 7), "y": picture(2, 3, 5, 7)}, {}, lambda a: a,
    ),
    "a gate per channel": (
        lambda: {"a": picture(2, 8, 4, 4), "b": picture(2, 8, 1, 1), "y": picture(2, 8, 4, 4)},
        {"operation": "multiply"}, lambda a, b: a * b,
    ),
    "a gate, a shortcut and ReLU": (
        lambda: {"a": picture(2, 8, 3, 5), "b": picture(2, 8, 1, 1), "c": picture(2, 8, 3, 5),
                 "y": picture(2, 8, 3, 5)},
        {"operation": "multiply", "activation": "relu"}, lambda a, b, c: (a * b + c).relu(),
    ),
    "a gate per pixel": (
        lambda: {"a": picture(3, 5, 4, 4), "b": picture(3, 1, 4, 4), "y": picture(3, 5, 4, 4)},
        {"operation": "subtract", "activation": "hardswish"}, lambda a, b: F.hardswish(a - b),
    ),
    "a constant per channel": (
        lambda: {"a": picture(2, 6, 3, 3), "b": torch.randn(6, 1, 1), "y": picture(2, 6, 3, 3)},
        {"operation": "divide"}, lambda a, b: a / b,
    ),
    "bytes to normalised pixels": (
        lambda: {"a": torch.randint(0, 256, (2, 5, 3, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
                 "b": torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1),
                 "c": torch.tensor([0.2, 0.3, 0.25]).reshape(3, 1, 1), "y": picture(2, 3, 5, 3)},
        {"operation": "normalise"}, lambda a, b, c: (a / 255 - b) / c,
    ),
    "prelu": (
        lambda: {"a": picture(2, 6, 3, 3), "b": picture(1, 6, 1, 1), "y": picture(2, 6, 3, 3)},
        {"operation": "prelu"}, lambda a, b: F.prelu(a, b.flatten()),
    ),
    "a number": (
        lambda: {"a": picture(1030), "y": picture(1030, dtype=torch.float32)},
        {"operation": "add", "number": 3.0, "activation": "relu6"}, lambda a: F.relu6(a + 3.0),
    ),
    "some channels of a concatenation": (
        lambda: {"a": picture(2, 12, 3, 3)[:, 4:8], "y": picture(2, 4, 3, 3)}, {}, lambda a: a,
    ),
    "shuffled channels": (
        lambda: {"a": picture(2, 6, 4, 5).unflatten(1, (2, 3)).transpose(1, 2), "y": torch.zeros(2, 3, 2, 4, 5).half()},
        {}, lambda a: a,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_elementwise(case: str) -> None:
    make, settings, expected = ELEMENTWISE[case]
    tensors = make()
    problem = ElementwiseProblem.of(tensors, **settings)
    (launch,) = select_config(problem, TARGET).launches(problem, TARGET)
    stored = {name: whole(tensor) for name, tensor in tensors.items()}
    interpreted(launch, stored)
    given = [tensors[name].double() for name in "abc" if name in tensors]
    exact = expected(*given)
    y64, sigma, _ = problem.expected(stored)
    y = tensors["y"].double()
    torch.testing.assert_close(y64.flatten().sort()[0], exact.flatten().sort()[0])  # the axes may be in another order
    assert Deviation.of(y, exact, sigma.max().expand_as(y), torch.ones_like(y, dtype=torch.bool)).max_z < 9
    torch.testing.assert_close(y, exact, rtol=2e-3, atol=1e-4)


def pool(x: Tensor, out: tuple[int, int], kernel: tuple[int, int], **settings: Any) -> PoolProblem:
    n, c, height, width = x.shape
    return PoolProblem(n, c, height, width, *out, kernel, dtype=x.dtype, **settings)


X = (2, 20, 9, 11)
POOLS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "max 3x3": (
        {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "maximum": True},
        lambda x: F.max_pool2d(x, 3, 2, 1),
    ),
    "max of dilated windows that reach beyond": (
        {"kernel": (2, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (2, 1), "maximum": True},
        lambda x: F.max_pool2d(x, (2, 3), 2, 1, (2, 1), ceil_mode=True),
    ),
    "average beside the padding": (
        {"kernel": (2, 2), "stride": (2, 2), "padding": (1, 1), "counts_padding": False},
        lambda x: F.avg_pool2d(x, 2, 2, 1, count_include_pad=False),
    ),
    "average of windows that reach beyond": (
        {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 1)},
        lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True),
    ),
    "a sum over 5": (
        {"kernel": (3, 3), "stride": (1, 2), "divisor": 5},
        lambda x: F.avg_pool2d(x, 3, (1, 2), divisor_override=5),
    ),
    "adaptive": ({"kernel": (3, 5), "adaptive": True}, lambda x: F.adaptive_avg_pool2d(x, (4, 3))),
    "of all pixels": ({"kernel": (9, 11)}, lambda x: x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", POOLS)
def test_pools(case: str, dtype: torch.dtype) -> None:
    settings, expected = POOLS[case]
    x = picture(*X, dtype=dtype)
    exact = expected(x.double())
    problem = pool(x, (exact.shape[2], exact.shape[3]), **settings)
    (launch,) = select_config(problem, TARGET).launches(problem, TARGET)
    y = interpreted(launch, {"x": x, "y": torch.empty_like(exact, dtype=dtype)}).double()
    y64, sigma, _ = problem.expected({"x": x})
    torch.testing.assert_close(y64, exact)
    assert not Deviation.of(y, exact, sigma, torch.ones_like(y, dtype=torch.bool)).failures(dtype)


def test_a_maximum_keeps_nan() -> None:
    x = picture(1, 16, 4, 4)
    x[0, 3, 1, 1] = torch.nan
    problem = pool(x, (2, 2), (2, 2), stride=(2, 2), maximum=True)
    (launch,) = select_config(problem, TARGET).launches(problem, TARGET)
    y = interpreted(launch, {"x": x, "y": picture(1, 16, 2, 2)})
    assert y.isnan().nonzero().tolist() == [[0, 3, 0, 0]]


def test_the_code_is_the_same_for_every_batch() -> None:
    """Runtime sizes alone change with the batch, so one compiled kernel serves all."""
    from kernels.compile import code_key

    def keys(n: int) -> list[Any]:
        tensors = {"a": picture(n, 8, 4, 4), "b": picture(n, 8, 1, 1), "y": picture(n, 8, 4, 4)}
        problems = (
            ElementwiseProblem.of(tensors, operation="multiply"),
            ElementwiseProblem.of({"a": picture(n, 10), "y": picture(n, 10)}),
            pool(picture(n, 8, 6, 6), (3, 3), (2, 2), stride=(2, 2)),
        )
        return [code_key(launch) for p in problems for launch in select_config(p, TARGET).launches(p, TARGET)]

    assert keys(1) == keys(2) == keys(7)
