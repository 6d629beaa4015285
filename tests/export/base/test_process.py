"""Work in a process of its own: answers, refusals, and every way to die, each as one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from export import ExportError
from export.base.process import Child, ChildFault, run_in_child
from tests import children

TASK, ADVICE = "building the engine", "lower --workspace"
ROOT = Path(__file__).resolve().parents[3]


def run(code: str) -> object:
    return run_in_child(TASK, ADVICE, "builtins:exec", code)


def test_a_function_runs_elsewhere_and_its_result_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickle.py").write_text("raise SystemExit('a file of the current folder was imported')")
    payload = os.urandom(5_000_000)  # more than a pipe holds
    assert run_in_child(TASK, ADVICE, "builtins:bytes", payload) == payload
    assert run_in_child(TASK, ADVICE, "os:getpid") != os.getpid()
    assert run_in_child(TASK, ADVICE, "os:getcwd") == str(tmp_path)
    assert Path(run_in_child(TASK, ADVICE, "builtins:eval", "__import__('export').__file__")).parents[1] == ROOT


DEATHS = {
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (most likely out of memory)"),
    "exit": ("import sys; print('first', file=sys.stderr); print('last'); sys.stdout.flush(); import os; os._exit(7)",
             "ended with exit code 7, its last words: last"),
    "no memory": ("raise MemoryError", "ran out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", DEATHS)
def test_a_death_is_one_line_that_says_what_to_lower(case: str) -> None:
    code, reason = DEATHS[case]
    with pytest.raises(ExportError) as error:
        run(code)
    message = str(error.value)
    assert message.startswith(f"{TASK} ") and reason in message and message.endswith(f": {ADVICE}")
    assert "\n" not in message


def test_refusals_and_faults_are_told_apart() -> None:
    with pytest.raises(ExportError, match=r"^no such thing$"):
        run("from export.base.errors import ExportError\nraise ExportError('no such thing')")
    with pytest.raises(ExportError, match=r"^building the engine failed: OSError: \[Errno 28\] No space left$"):
        run("raise OSError(28, 'No space left')")
    with pytest.raises(ChildFault, match=r"^building the engine failed: RuntimeError: no kernel\n\nTraceback"):
        run("raise RuntimeError('no kernel\\nof many lines')")
    with pytest.raises(ChildFault, match=r"^building the engine failed: ZeroDivisionError: division.*\n\nTraceback"):
        run("1 / 0")
    with pytest.raises(ExportError, match="failed: ModuleNotFoundError"):
        run_in_child(TASK, ADVICE, "no_such_module:f")


def test_what_it_prints_is_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="export.base.process"):
        run("import logging; print('to stdout', flush=True); logging.getLogger('builder').debug('chosen: kernel 7')")
    assert {"to stdout", "chosen: kernel 7"} <= {record.message for record in caplog.records}
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


class Counter:
    """What a child holds in these tests."""

    def __init__(self, start: int, closed: str) -> None:
        self.value, self.closed = start, closed

    def add(self, number: int) -> int:
        self.value += number
        return self.value

    def crash(self) -> None:
        os.abort()

    def close(self) -> None:
        Path(self.closed).write_text(str(self.value))


COUNTER = "tests.export.base.test_process:Counter"


def test_an_object_is_held_between_requests_and_closed_at_the_end(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    with Child(TASK) as child:
        child.hold(COUNTER, 5, str(closed))
        assert child.call("add", 2) == 7 and child.call("add", 1) == 8
        with pytest.raises(ChildFault, match="failed: TypeError"):
            child.call("add", "one")
        assert child.call("add", 1) == 9 and not closed.exists()
    assert closed.read_text() == "9"


def test_a_crash_between_requests_is_told_once_and_again(tmp_path: Path) -> None:
    with Child(TASK) as child:
        child.hold(COUNTER, 5, str(tmp_path / "closed"))
        for method in ("crash", "add"):
            with pytest.raises(ExportError, match=r"^building the engine was ended by SIGABRT$"):
                child.call(method)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_error_here_ends_it_at_once() -> None:
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), Child(TASK) as child:
        pid = child.run("os:getpid")
        raise KeyboardInterrupt
    assert not alive(pid) and time.perf_counter() - started < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_stops_all_processes_is_left_to_the_parent(number: signal.Signals) -> None:
    """Were the child to die of it first, the parent would report a crash."""
    with Child(TASK) as child:
        os.kill(child.run("os:getpid"), number)
        assert child.run("operator:add", 1, 2) == 3


def test_it_ends_with_a_parent_that_is_killed() -> None:
    """Whatever it computes meanwhile."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from export.base.process import Child\n"
        "with Child('x') as child: print(child.run('os:getpid'), flush=True); child.run('time:sleep', 1000)"
    )
    process = children.start([sys.executable, "-c", code])
    assert process.stdout is not None
    pid, deadline = int(process.stdout.readline()), time.monotonic() + 500
    process.kill()
    process.wait()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    process.stdout.close()


def test_processes_that_build_and_run_engines_do_without_pytorch() -> None:
    engines = "export.runtime.engines.build_worker, export.runtime.engines.run_worker"
    modules = f"export.base.process_worker, {engines}, export.runtime.artefacts"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import {modules}; assert 'torch' not in sys.modules"
    process = children.run([sys.executable, "-c", code, ROOT])
    assert process.returncode == 0, process.stderr
