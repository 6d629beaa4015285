"""Tuned tables: their keys, their entries, and what becomes of broken ones."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels.configs.selection
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.configs.heuristic import heuristic_config
from kernels.configs.selection import select_config, tuned_table
from kernels.configs.targets import TARGETS
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemProblem, StemWindowsConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, PairConfig
from kernels.operators.mean_linear import HeadConfig
from kernels.problems import Problem, Projection
from tests.kernels.cases import BOTTLENECK_CASES, CASES, DTYPES, HEAD_CASES, SMALL
from tests.kernels.networks import EXTRA, NETWORKS

TARGET = TARGETS["sm_90"]
CONV = ConvConfig(64, 32, 32, 4, 2, split_k=3)
CONFIGS: dict[str, Config] = {
    "conv": CONV,
    "boxes": ConvConfig(128, 64, 64, 4, 3, box=(2, 8, 8), programs_per_sm=2),
    "bottleneck": BottleneckConfig(64, 64, 32, 4, 2, box=(1, 8, 8)),
    "pair": PairConfig(CONV, ConvConfig(16, 16, 16, 1, 1, box=(1, 1, 16))),
    "stem": StemConfig(64, 64, 32, 2, 4, 2),
    "stem windows": StemWindowsConfig(32, 64, 128, 2, 4, 3),
    "head": HeadConfig(16, 64, 32, 4),
}


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tuned tables, which nothing remembers afterwards."""
    monkeypatch.setattr(kernels.configs.selection, "TUNED", tmp_path)
    tuned_table.cache_clear()
    select_config.cache_clear()
    yield tmp_path
    tuned_table.cache_clear()
    select_config.cache_clear()


def write_table(folder: Path, configs: dict[str, object]) -> None:
    (folder / "sm_90.json").write_text(json.dumps({"gpu": "H100", "configs": configs}))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name: str) -> None:
    entry = json.loads(json.dumps(CONFIGS[name].to_json()))
    assert Config.from_json(entry) == CONFIGS[name]


def test_a_problem_has_a_key_of_its_own() -> None:
    changes: list[dict[str, Any]] = [{"groups": 2}, {"relu": False}, {"has_residual": False}]
    changes += [{field: getattr(SMALL, field) + 1} for field in ("batch", "c_in", "height", "width", "c_out")]
    pairs = itertools.product(("kernel", "stride", "padding", "dilation"), ((2, 3), (3, 2)))
    changes += [{field: pair} for field, pair in pairs]
    sizes = ((48, 6, 7, (1, 1)), (49, 6, 7, (1, 1)), (48, 11, 13, (2, 2)), (48, 12, 13, (2, 2)), (48, 6, 13, (1, 2)))
    changes += [{"has_residual": False, "projection": Projection(*size)} for size in sizes]
    networks = [problem for network in NETWORKS.values() for batch in (1, 32) for problem in network(batch)]
    stem = StemProblem(replace(SMALL, has_residual=False))
    variants: list[Problem] = [SMALL, stem, *(replace(SMALL, **change) for change in changes)]
    problems: set[Problem] = {*CASES.values(), *EXTRA.values(), *networks, *variants}
    typed = {problem.with_dtype(dtype) for problem in problems for dtype in DTYPES.values()}
    assert len({problem.key for problem in typed}) == len(typed) > 400


def test_keys_are_readable() -> None:
    head, bottleneck = HEAD_CASES["resnet18"], BOTTLENECK_CASES["128-projection-s2"]
    assert replace(SMALL, stride=(2, 1)).key == "conv fp16 n2 32x6x7 -> 40 3x3 s2x1 p1x1 residual relu"
    assert replace(head, dtype=torch.bfloat16).key == "head bf16 n5 512x7x7 -> 1000"
    expected = "bottleneck fp16 n2 128x8x9 -> 128 3x3 s2x2 p1x1 -> 512 projection 256x8x9 s2x2 relu"
    assert bottleneck.key == expected


def test_a_tuned_entry_is_used(tuned: Path) -> None:
    write_table(tuned, {SMALL.key: CONV.to_json()})
    assert select_config(SMALL, TARGET) == CONV != heuristic_config(SMALL, TARGET)
    assert tuned_table("sm_80") == {}
    other = replace(SMALL, batch=3)
    assert select_config(other, TARGET) == heuristic_config(other, TARGET)
    assert select_config(SMALL, TARGETS["sm_80"]) == heuristic_config(SMALL, TARGETS["sm_80"])


BROKEN = {
    "not-json": "{",
    "a-list": "[]",
    "no-configs": '{"gpu": "H100"}',
    "configs-a-list": '{"configs": [1]}',
    "no-kind": '{"configs": {"conv": {"block_m": 16}}}',
    "unknown-kind": '{"configs": {"conv": {"kind": "winograd"}}}',
    "unknown-field": '{"configs": {"head": {"kind": "head", "tile": 16}}}',
    "missing-field": '{"configs": {"head": {"kind": "head", "block_m": 16}}}',
    "half-a-pair": json.dumps({"configs": {"b": {"kind": "pair", "first": {"block_m": 16}}}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_in_one_line(name: str, tuned: Path) -> None:
    (tuned / "sm_90.json").write_text(BROKEN[name])
    with pytest.raises(ValueError, match=r"sm_90\.json: expected a table written by scripts/tune\.py: ") as refusal:
        select_config(SMALL, TARGET)
    assert "\n" not in str(refusal.value)


def test_an_entry_that_cannot_run_its_problem_is_refused(tuned: Path) -> None:
    write_table(tuned, {SMALL.key: replace(CONV, split_k=10).to_json()})
    with pytest.raises(ValueError, match=r"sm_90\.json: conv fp16 n2 .* relu: split_k is 10, expected at most the 9"):
        select_config(SMALL, TARGET)


def test_committed_tables_are_valid() -> None:
    """Every entry parses, and every one for a problem of the known networks is valid for it."""
    assert {path.stem for path in kernels.configs.selection.TUNED.glob("*")} <= TARGETS.keys()
    batches = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    problems = {problem for network in NETWORKS.values() for batch in batches for problem in network(batch)}
    for target in TARGETS.values():
        table = tuned_table(target.name)
        for problem in (problem.with_dtype(dtype) for problem in problems for dtype in DTYPES.values()):
            config = table.get(problem.key)
            assert config is None or config.unsupported_reason(problem, target) is None, (target.name, problem)
