"""Fixtures every room uses. Without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores: threads of one would wait for those of another

import pytest
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from export.sample_inputs import crops, photographs
from resnet.initialise import initialise
from resnet.models import create_model

IMAGE_SIZES = {"resnet18": 64, "resnet20": 32, "resnet50": 64}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in, or taken from, the cache of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pictures() -> dict[str, Tensor]:
    """Eight crops of photographs, per model at its size."""
    return {name: crops(photographs(), 8, 3, (size, size)) for name, size in IMAGE_SIZES.items()}


@pytest.fixture(scope="session")
def calibrated() -> dict[str, nn.Module]:
    """Seeded models with calibrated BatchNorm. Tests copy what they change."""
    models: dict[str, nn.Module] = {}
    for name, size in IMAGE_SIZES.items():
        model = create_model(name)
        initialise(model, crops(photographs(), 16, 3, (size, size), seed=1))
        models[name] = model.eval()
    return models


@pytest.fixture(scope="session")
def trained_digits() -> tuple[nn.Module, Tensor]:
    """A resnet20 trained for a few seconds on handwritten digits, and eight digits it has not seen."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images, labels = F.interpolate(images, scale_factor=2.0), torch.from_numpy(digits.target)
    torch.manual_seed(0)
    model = create_model("resnet20", in_channels=1)
    initialise(model, images[:64])
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(120):
        batch = torch.randint(0, 1500, (32,))
        optimiser.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    assert accuracy > 0.8, f"training went wrong: {accuracy:.2f}"
    return model, images[1500:1508]
