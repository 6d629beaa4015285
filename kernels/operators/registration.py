"""Register an operator: checked, on a CPU by its reference, on a GPU by its Triton kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.operators.checks import CHECKS
from kernels.problems import KERNEL_DTYPES

# The reference also serves as the oracle, hence float64.
REFERENCE_DTYPES = (*KERNEL_DTYPES, torch.float64)


def register(name: str, arguments: str, reference: Callable[..., Tensor]) -> None:
    """Register `resnet_deploy::<name>(<arguments>) -> Tensor`.

    kernels/launch.py and with it Triton is imported when an operator first runs on a GPU and not before.

    Args:
        name: of the operator, which CHECKS knows.
        arguments: with their types, as the schema of a custom operator states them.
        reference: the operator in plain torch: what runs on a CPU.
    """
    check = CHECKS[name]

    def on_cpu(*args: Any) -> Tensor:
        check(*args, dtypes=REFERENCE_DTYPES)
        return reference(*args)

    def on_gpu(*args: Any) -> Tensor:
        try:
            from kernels import launch
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "triton":
                raise
            raise ModuleNotFoundError(
                f"{name} on a GPU needs the package triton: pip install 'triton>=3.6'", name="triton"
            ) from error
        return launch.run(name, *args)

    def fake(x: Tensor, *args: Any) -> Tensor:
        dtypes = KERNEL_DTYPES if x.device.type == "cuda" else REFERENCE_DTYPES
        shape = check(x, *args, dtypes=dtypes)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    operator = torch.library.custom_op(
        f"resnet_deploy::{name}",
        on_cpu,
        mutates_args=(),
        device_types="cpu",
        schema=f"({arguments}) -> Tensor",
        # A compiler must hand over the layouts it traced: the operators refuse any but channels_last.
        tags=(torch.Tag.needs_exact_strides,),
    )
    operator.register_kernel("cuda")(on_gpu)
    operator.register_fake(fake)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What a reference computes in: float32 for the 16-bit types."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
