"""Memory that was freed is kept where that was asked for, and comes back when it is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.children import run

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import resource
from export.base.memory import give_back, keep

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    values = [b"x" * 25_000_000 for _ in range(4)]
    del values
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults(), faults()]
keep()
found += [faults(), faults()]
give_back()
print(*found, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    outcome = run([sys.executable, "-c", CODE], cwd=ROOT)
    assert not outcome.returncode, outcome.stderr
    first, again, _, kept, given_back = map(int, outcome.stdout.split())
    assert min(first, again, given_back) > 10_000 > 100 * kept
