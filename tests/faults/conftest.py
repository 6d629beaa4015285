"""One small network, exported once: what the tests of this folder damage, replace and kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export import ExportConfig, export_bundle, job, pipeline
from export.sample_inputs import crops, photographs
from resnet.data.preprocessing import Preprocessing
from resnet.initialise import initialise
from resnet.models import create_model

SIZE = 16
CONFIG = ExportConfig("fp32", (1, 2, 4), "none")
PREPROCESSING = Preprocessing((SIZE, SIZE), (SIZE, SIZE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
METADATA = {
    "name": "resnet8",
    "classes": [f"class {index}" for index in range(10)],
    "data": "nothing",
}


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads are not forked: a forked child that computes with more than one waits for the others for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images() -> Tensor:
    return crops(photographs(), 16, 3, (SIZE, SIZE))


@pytest.fixture(scope="session")
def resnet8(images: Tensor) -> nn.Module:
    """Seeded, with calibrated BatchNorm; tests copy what they change."""
    return initialise(create_model("resnet8"), crops(photographs(), 16, 3, (SIZE, SIZE), seed=1)).eval()


@pytest.fixture(scope="session")
def export_again(resnet8: nn.Module, images: Tensor) -> Callable[[Path], None]:
    """`export_bundle` of `resnet8` into a folder, with everything but the computing, which is done once, here.

    A forked child may call it: threads, which computing needs, are not forked.
    """
    results: dict[str, object] = {}

    def once(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if name not in results:
                results[name] = function(*arguments)
            return results[name]

        return call

    slow = ("fuse", "floating_forms", "_compare", "describe_graph", "render")
    replacements: list[tuple[Any, str, Any]] = [(job, "check_model", once("check_model", job.check_model))]
    replacements += [(pipeline, name, once(name, getattr(pipeline, name))) for name in slow]

    def export(output: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for replacement in replacements:
                patch.setattr(*replacement)
            result = export_bundle(
                resnet8, images[:1], output, CONFIG, images=images, preprocessing=PREPROCESSING, metadata=METADATA
            )
        assert result, result.report.verdict

    return export


@pytest.fixture(scope="session")
def bundle(export_again: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle, exported before `export_again` is used elsewhere; tests copy what they change."""
    output = tmp_path_factory.mktemp("exported") / "bundle"
    export_again(output)
    return output
