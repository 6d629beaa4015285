"""What rounding alone makes of a network is a reference where, not rounded, it is the network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from export import Batch, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.references import run_oracle, run_rounded
from export.fusion.capture import plain_torch
from export.fusion.nodes import args_of, aten, deep_copy, is_call, parameter
from export.fusion.passes import FOLDING
from export.fusion.program import output_names
from export.runtime.parity.ladder import References, reference_rungs
from export.runtime.parity.rungs import Rung
from tests.export.zoo import SIZE, pictures, settled

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]  # gamma, beta, mean and variance of one BatchNorm
BROKEN: dict[str, Callable[[Statistics], object]] = {
    "gammas swapped": lambda s: s[0].copy_(s[0][[1, 0, *range(2, len(s[0]))]]),
    "bias dropped": lambda s: s[1].zero_(),
    "means swapped": lambda s: s[2].copy_(s[2].flip(0)),
    "1 % more variance of one channel": lambda s: s[3][2].mul_(1.01),
    "wrong epsilon": lambda s: None,
}


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, FusedProgram, References]:
    """In bfloat16, rounding costs this one four times as much with BatchNorm folded as without."""
    model = settled("resnext")
    program = fuse(model, torch.zeros(1, 3, SIZE, SIZE), Batch(1, 8, 32))
    return (
        model,
        program,
        run_oracle(model, program, output_names(program.graph_module), {"input": pictures(16, 3, 77).numpy()}),
    )


def rungs_of(network: tuple[nn.Module, FusedProgram, References], program: FusedProgram, precision: str) -> list[Rung]:
    model, _, oracle = network
    p = PRECISIONS[precision]
    return reference_rungs(run_rounded(oracle, model, program, p), p)


@pytest.mark.right_network
def test_rounding_may_cost_a_folded_network_any_factor(
    network: tuple[nn.Module, FusedProgram, References], precision: str
) -> None:
    eager, folded = rungs_of(network, network[1], precision)
    assert eager and folded and eager.worst is not None and folded.worst is not None
    assert precision != "bf16" or folded.worst.error > 3.5 * eager.worst.error


@pytest.mark.mutant
@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_fold_is_no_rounding(
    defect: str, network: tuple[nn.Module, FusedProgram, References], precision: str
) -> None:
    """In one BatchNorm; of the epsilon in all."""
    right = network[1]
    graph_module = deep_copy(right.source)
    norms = [n for n in graph_module.graph.nodes if is_call(n, aten._native_batch_norm_legit_no_training.default)]
    with plain_torch():
        gamma, beta, mean, variance = (parameter(graph_module, node) for node in args_of(norms[3])[1:5])
        BROKEN[defect]((gamma, beta, mean, variance))
        for norm in norms if defect == "wrong epsilon" else []:
            norm.args = (*args_of(norm)[:6], 1e-3)
        for apply in FOLDING:
            graph_module = apply(graph_module)
    eager, folded = rungs_of(network, FusedProgram(right.source, graph_module, right.master, right.batch), precision)
    assert eager and not folded
    assert folded.verdict.startswith("(exact): with BatchNorm folded the graph in float64 is not the model: output is ")
