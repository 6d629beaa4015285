"""Which configuration a problem is launched with: the tuned table of its target where it has an entry, else the rules.

A table is `kernels/tuned/<target>.json`, written by `scripts/tune.py` on a GPU of that target:
{"gpu", "triton", "torch", "date", "configs": {problem key: {"kind", and the fields of the configuration}}}.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.configs.config import (
    BottleneckConfig,
    Config,
    ConvConfig,
    HeadConfig,
    PairConfig,
    StemConfig,
    unsupported_reason,
)
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import Target
from kernels.problems import BottleneckProblem, ConvProblem, HeadProblem, Problem, Projection, StemProblem

TUNED = Path(__file__).parent / "tuned"
_KINDS: dict[str, type] = {
    "conv": ConvConfig,
    "bottleneck": BottleneckConfig,
    "pair": PairConfig,
    "stem": StemConfig,
    "head": HeadConfig,
}


@functools.lru_cache(maxsize=4096)
def select_config(problem: Problem, target: Target) -> Config:
    """The configuration with which to run `problem` on `target`.

    Raises:
        ValueError: no configuration can run it, or the tuned table's entry is not valid for it.
    """
    tuned = tuned_table(target.name).get(problem_key(problem))
    if tuned is None:
        return heuristic_config(problem, target)
    reason = unsupported_reason(problem, tuned, target)
    if reason is not None:
        raise ValueError(f"{table_path(target.name)}: {problem_key(problem)}: {reason}")
    return tuned


def table_path(target_name: str) -> Path:
    return TUNED / f"{target_name}.json"


@functools.cache
def tuned_table(target_name: str) -> Mapping[str, Config]:
    """The tuned configurations of a target by problem key; empty where nobody has tuned.

    Raises:
        ValueError: the file is not such a table.
    """
    path = table_path(target_name)
    if not path.exists():
        return {}
    try:
        return {key: config_from_json(entry) for key, entry in json.loads(path.read_text())["configs"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a table written by scripts/tune.py: {error!r}") from error


def write_table(target_name: str, header: Mapping[str, str], configs: Mapping[str, Config]) -> Path:
    """Write the table of a target, over an older one, whole or not at all; returns its path."""
    path = table_path(target_name)
    path.parent.mkdir(exist_ok=True)
    entries = {key: config_to_json(config) for key, config in sorted(configs.items())}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**header, "configs": entries}, indent=1) + "\n")
    partial.replace(path)
    tuned_table.cache_clear()
    select_config.cache_clear()
    return path


def config_to_json(config: Config) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if isinstance(config, cls))
    return {"kind": kind, **asdict(config)}


def config_from_json(entry: Mapping[str, Any]) -> Config:
    """Raises KeyError, TypeError or ValueError for what `config_to_json` does not write."""
    fields = dict(entry)
    kind = fields.pop("kind")
    if kind == "pair":
        return PairConfig(ConvConfig(**_tupled(fields["first"])), ConvConfig(**_tupled(fields["second"])))
    config: Config = _KINDS[kind](**_tupled(fields))
    return config


def _tupled(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def problem_key(problem: Problem) -> str:
    """A problem in one readable line, such as `conv fp16 n8 64x56x56 -> 256 1x1 residual relu`."""
    if isinstance(problem, ConvProblem):
        words = ["conv", *_conv_words(problem), *_shortcut_words(problem.has_residual, problem.projection)]
        return " ".join([*words, *(["relu"] if problem.relu else [])])
    if isinstance(problem, BottleneckProblem):
        words = ["bottleneck", *_conv_words(problem.first), f"-> {problem.c_out}"]
        words += _shortcut_words(problem.has_residual, problem.projection)
        return " ".join([*words, *(["relu"] if problem.relu else [])])
    if isinstance(problem, StemProblem):
        return " ".join(["stem", *_conv_words(problem.conv)])
    assert isinstance(problem, HeadProblem)
    size = f"{problem.c_in}x{problem.height}x{problem.width}"
    return f"head {_dtype_word(problem.dtype)} n{problem.batch} {size} -> {problem.c_out}"


def _dtype_word(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))


def _conv_words(problem: ConvProblem) -> list[str]:
    size = f"{problem.c_in}x{problem.height}x{problem.width}"
    words = [_dtype_word(problem.dtype), f"n{problem.batch}", size, f"-> {problem.c_out}", _pair(problem.kernel)]
    if problem.stride != (1, 1):
        words.append(f"s{_pair(problem.stride)}")
    if problem.padding != (0, 0):
        words.append(f"p{_pair(problem.padding)}")
    if problem.dilation != (1, 1):
        words.append(f"d{_pair(problem.dilation)}")
    if problem.groups > 1:
        words.append(f"g{problem.groups}")
    return words


def _shortcut_words(has_residual: bool, projection: Projection | None) -> list[str]:
    words = ["residual"] if has_residual else []
    if projection is not None:
        size = f"{projection.c_in}x{projection.height}x{projection.width}"
        words.append(f"projection {size} s{_pair(projection.stride)}")
    return words


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}x{values[1]}"
