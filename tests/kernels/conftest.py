"""Where kernels run, and the compilers that work in the background meanwhile."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
# As many compilers at once as the smallest machine that runs the tests has cores.
PROCESSES = 2


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels run: in Triton's interpreter on CPU tensors, or on a GPU."""
    if request.param == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: the same case runs on the GPU")
    return torch.device("cpu")


def awaits_compilers(item: pytest.Item) -> bool:
    return "compiled" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever waits for the compilers comes last."""
    items.sort(key=awaits_compilers)


def start_worker(module: str, arguments: list[str], cache: Path) -> subprocess.Popen[str]:
    """A process without the interpreter; nothing is taken from an earlier run's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="session", autouse=True)
def compilers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[subprocess.Popen[str]]]:
    """Compile workers, started with the first test so that they share the time of all others."""
    if not any(map(awaits_compilers, request.session.items)):
        yield []
        return
    names = [*TARGETS]
    shares = [names[first::PROCESSES] for first in range(PROCESSES)]
    workers = [start_worker("compile_worker", share, tmp_path_factory.mktemp("triton")) for share in shares]
    yield workers
    for worker in workers:
        worker.kill()
        worker.communicate()
