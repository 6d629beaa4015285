"""How hard the tests search that try whatever inputs come: 1, and by `make test-faults` 10 times as many of each."""

from __future__ import annotations

import os

TIMES = int(os.environ.get("TEST_TIMES", "1"))
