"""The C++ runtime, built once for this machine."""

from __future__ import annotations

import pytest

from tests.cuda_stand_in.building import HOST
from tests.kernels.runtime.running import Cpp


@pytest.fixture(scope="session")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Cpp:
    return Cpp(tmp_path_factory.mktemp("host"), HOST)
