"""Child processes with limits that end a child that hangs, and never one that waits its turn on a busy machine.

What counts is the processor time of the child itself. The clock only ends a child that waits for what never comes and
so uses none; it is set to what no sound child takes on any machine.
"""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CPU_SECONDS = 900  # of one process, on the slowest machine; the longest child of these tests takes about 60
CLOCK_SECONDS = 2 * 3600.0

fork = multiprocessing.get_context("fork")


def start(
    command: Sequence[str | Path], *, cpu_seconds: int = CPU_SECONDS, file_bytes: int | None = None, **options: Any
) -> subprocess.Popen[str]:
    """A program that has just begun, whose output `finish` returns.

    Args:
        command: the program and its arguments.
        cpu_seconds: of processor time, after which the process is ended by SIGXCPU; each of its children has as much.
        file_bytes: how large a file it may write; a larger one fails as if the disk were full.
        options: of `subprocess.Popen`: cwd, env.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([str(part) for part in command], **{**pipes, **options})
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    if file_bytes is not None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    return process


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a program; its exit code and what it wrote. AssertionError where it waits for what never comes."""
    try:
        stdout, stderr = process.communicate(timeout=CLOCK_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{process.args!r:.300} was not done after {CLOCK_SECONDS / 3600:.0f} h") from None
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `options` are those of `start`."""
    return finish(start(command, **options))


def limit_cpu(seconds: int = CPU_SECONDS) -> None:
    """End this process once it has used so much processor time from now on."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = int(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))


def in_forks(*functions: Callable[[], Any]) -> list[Any]:
    """What functions return that run at the same time, each in a forked child, which may change its own limits.

    Threads are not forked: what computes with several would wait for them.

    Raises:
        AssertionError: one of them raised, which stderr says, or its process ended.
    """
    pipes = [fork.Pipe(duplex=False) for _ in functions]

    def answer(index: int) -> None:
        limit_cpu()
        pipes[index][1].send(functions[index]())

    children = [fork.Process(target=answer, args=(index,)) for index in range(len(functions))]
    try:
        for child in children:
            child.start()
        for _, there in pipes:
            there.close()
        answers = []
        for child, (here, _) in zip(children, pipes, strict=True):
            assert here.poll(CLOCK_SECONDS), "the child waits for what never comes"
            try:
                answers.append(here.recv())
            except EOFError:
                child.join()
                raise AssertionError(f"the child ended with exit code {child.exitcode}") from None
        return answers
    finally:
        for child in children:
            child.kill()
            child.join()
