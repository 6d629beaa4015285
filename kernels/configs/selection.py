"""Which configuration a problem is launched with: the tuned table of its target where it has an entry, else the rules.

A table is `kernels/tuned/<target>.json`, written by `scripts/tune.py` on a GPU of that target:
{"gpu", "triton", "torch", "date", "configs": {problem key: {"kind", and the fields of the configuration}}}.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from kernels.configs.config import Config
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import Target
from kernels.problems import Problem

TUNED = Path(__file__).parent / "tuned"


@functools.lru_cache(maxsize=4096)
def select_config(problem: Problem, target: Target) -> Config:
    """The configuration with which to run `problem` on `target`.

    Raises:
        ValueError: no configuration can run it, or the tuned table's entry is not valid for it.
    """
    tuned = tuned_table(target.name).get(problem.key)
    if tuned is None:
        return heuristic_config(problem, target)
    reason = tuned.unsupported_reason(problem, target)
    if reason is not None:
        raise ValueError(f"{table_path(target.name)}: {problem.key}: {reason}")
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
        return {key: Config.from_json(entry) for key, entry in json.loads(path.read_text())["configs"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a table written by scripts/tune.py: {error!r}") from error


def write_table(
    target_name: str,
    header: Mapping[str, str],
    configs: Mapping[str, Config],
    write: Callable[[Path, bytes], object],
) -> Path:
    """Have `write` put the table of a target in place of an older one, whole or not at all; returns its path."""
    path = table_path(target_name)
    path.parent.mkdir(exist_ok=True)
    entries = {key: config.to_json() for key, config in sorted(configs.items())}
    write(path, f"{json.dumps({**header, 'configs': entries}, indent=1)}\n".encode())
    tuned_table.cache_clear()
    select_config.cache_clear()
    return path
