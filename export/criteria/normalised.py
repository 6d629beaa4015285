"""Whether a form that takes bytes makes of them, bit for bit, what a host would feed the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from export.base.precision import INT8, Precision
from export.fusion.nodes import input_nodes
from export.fusion.program import FusedProgram
from export.runtime.parity.checks import OperatorCheck, OperatorChecks, QuantisedCheck
from kernels.rounding import MAX_RMS_Z, MAX_Z

_KIND = "normalise"


def with_normalised(
    checks: OperatorChecks,
    program: FusedProgram,
    precision: Precision,
    inputs: Mapping[str, Tensor],
    trace: Mapping[str, Tensor],
) -> OperatorChecks:
    """The checks of a form's operators, behind one of each input.

    Args:
        checks: what was found of the operators on what the form made of the bytes.
        program: that the form was made from.
        precision: the form's.
        inputs: name -> what the same bytes are normalised to, float32.
        trace: node of the fused graph -> what the form made of them, in float32 or rounded to the precision.
    """
    found: list[OperatorCheck | QuantisedCheck] = []
    for name, node in input_nodes(program.master).items():
        reason, expected = "the runtime does not show it", inputs[name]
        if node.name in trace:
            got = trace[node.name].float()
            same = [torch.equal(got, expected.to(dtype).float()) for dtype in (torch.float32, precision.dtype)]
            reason = "" if any(same) else "it is not what the bytes are where they are normalised before the network"
        error = math.inf if reason else 0.0
        if precision is INT8:
            found.append(QuantisedCheck(name, _KIND, error, float(bool(reason)), reason))
        else:
            limits = (MAX_RMS_Z, MAX_Z[precision.dtype])
            found.append(OperatorCheck(name, _KIND, error, error, *limits, reason))
    return replace(checks, checks=(*found, *checks.checks))
