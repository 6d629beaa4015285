"""Fixtures every room uses. Without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TypeVar

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores: threads of one would wait for those of another

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import export.pipeline
from export.sample_inputs import crops, photographs
from resnet.data.sources import open_splits
from resnet.initialise import initialise
from resnet.models import BasicBlock, Bottleneck, ResNet, create_model
from tests import libraries
from tests.captured import captured_once

# What the tests of a marker found wrong when they fail, and what they are.
RATES = {
    "right_network": ("false refusals", "right networks (kinds x precisions)"),
    "mutant": ("false acceptances", "mutants"),
}
IMAGE_SIZES = {"resnet8": 32, "resnet20": 32, "resnet50": 64, "basic": 64, "bottleneck": 64}
SMALL: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "basic": (BasicBlock, (1, 1, 1, 1)),
    "bottleneck": (Bottleneck, (2, 1, 1, 1)),
}
K = TypeVar("K")
T = TypeVar("T")


class Made(dict[K, T]):
    """Holds what `make` gives for a key, from when it is first asked for."""

    def __init__(self, make: Callable[[K], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: K) -> T:
        self[key] = self._make(key)
        return self[key]


libraries.do_once()
logging.getLogger("torch.__trace").disabled = True  # torch.export's account of itself, for which pytest has a handler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what `_old_objects_are_left_alone` froze is freed, or bindings complain of leaks


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How often the judge was wrong, of the tests that ran; how much of the compiled kernels they executed."""
    for marker, (wrong, what) in RATES.items():
        failed, passed = (
            sum(marker in report.keywords for report in terminalreporter.stats.get(outcome, []))
            for outcome in ("failed", "passed")
        )
        if failed + passed:
            terminalreporter.write_line(f"{wrong}: {failed} of {failed + passed} {what}")
    _write_emulated(terminalreporter)


def _write_emulated(terminalreporter: pytest.TerminalReporter) -> None:
    """By target, what tests/emulator/conftest.py noted: (target, code, blocks) and (target, what)."""
    reports = (report for found in terminalreporter.stats.values() for report in found)
    called = [report for report in reports if getattr(report, "when", "") == "call"]
    noted = [(name, *value) for report in called for name, value in report.user_properties if "emulated" in name]
    for target in sorted({entry[1] for entry in noted}):
        ran, unknown = (
            [rest for name, where, *rest in noted if (name, where) == (kind, target)]
            for kind in ("emulated", "not emulated")
        )
        blocks, kernels = sum(count for _, count in ran), len({code for code, _ in ran})
        skipped = len({what for (what,) in unknown})
        terminalreporter.write_line(
            f"emulator: {target}: {blocks} blocks of {kernels} compiled kernels executed, {skipped} kernels not"
        )


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in, or taken from, the cache of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_left_alone() -> None:
    """What libraries and earlier files have made, millions of objects, is not looked through at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_collection_after_each_export() -> Iterator[None]:
    """Which a user's one export asks for, to have its memory back early; hundreds of them get it in time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.pipeline, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(name="captured_once")
def _captured_once() -> Iterator[None]:
    """For tests that begin where a network has been captured."""
    with captured_once():
        yield


@pytest.fixture(scope="session")
def pictures() -> dict[str, Tensor]:
    """Eight crops of photographs, per model at its size."""
    return Made(lambda name: crops(photographs(), 8, 3, (IMAGE_SIZES[name], IMAGE_SIZES[name])))


@pytest.fixture(scope="session")
def calibrated() -> dict[str, nn.Module]:
    """Seeded models with calibrated BatchNorm; of the families of ResNet-18 and 50 few blocks. Tests copy them."""

    def calibrate(name: str) -> nn.Module:
        model = ResNet(*SMALL[name], num_classes=10, in_channels=3) if name in SMALL else create_model(name)
        size = IMAGE_SIZES[name]
        return initialise(model, crops(photographs(), 16, 3, (size, size), seed=1)).eval()

    return Made(calibrate)


@pytest.fixture(scope="session")
def trained_digits() -> tuple[nn.Module, Tensor]:
    """A resnet8 trained for seconds on handwritten digits, and eight digits it has not seen."""
    from tests.export.digits import PREPROCESSING, held_out_arrays  # slow to import where nobody asks for it

    train, steps = open_splits("digits").train, 120
    images, labels = torch.from_numpy(train.inputs(range(len(train)), PREPROCESSING)), torch.from_numpy(train.labels)
    torch.manual_seed(0)
    model = create_model("resnet8", in_channels=1)
    initialise(model, images[:64])
    optimiser = torch.optim.Adam(model.parameters())
    model.train()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        batch = torch.randint(0, len(images), (32,))
        optimiser.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    model.eval()
    unseen, classes = map(torch.from_numpy, held_out_arrays())
    with torch.no_grad():
        accuracy = (model(unseen).argmax(1) == classes).float().mean().item()
    assert accuracy > 0.85, f"training went wrong: {accuracy:.2f}"
    return model, unseen[:8]
