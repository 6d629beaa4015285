"""The processes that compile: an error ends them at once, and nothing of them outlives whoever began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kernels.workers import workers
from tests import children

ROOT = Path(__file__).resolve().parents[2]
LONG = 1000.0  # seconds: no test waits for that
CODE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from kernels.workers import workers
if __name__ == '__main__':
    with workers(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, {LONG}).result()
"""


def test_an_error_ends_them_with_what_is_still_to_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started, others = time.monotonic(), {*multiprocessing.active_children()}  # of pools that other tests keep
    with pytest.raises(KeyboardInterrupt), workers(1) as pool:
        there = pool.submit(tempfile.mkstemp).result()[1]
        assert tmp_path in Path(there).parents
        waiting = [pool.submit(time.sleep, LONG) for _ in range(3)]
        raise KeyboardInterrupt
    assert time.monotonic() - started < LONG and all(future.done() for future in waiting)
    assert not {*multiprocessing.active_children()} - others and not [*tmp_path.iterdir()]


def test_they_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "begin.py").write_text(CODE)
    process = children.start([sys.executable, tmp_path / "begin.py"])
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + LONG / 2
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
    process.stdout.close()
