"""Data to train on that takes no time."""

from __future__ import annotations

import numpy as np
import pytest

from resnet.data.labelled import Splits
from resnet.data.preprocessing import Preprocessing
from resnet.data.sources import open_splits, suggest_preprocessing

Data = tuple[Splits, Preprocessing]


@pytest.fixture(scope="session")
def digits() -> Data:
    """A tenth of the digits, at their own 8x8 pixels."""
    splits = open_splits("digits")
    few = np.arange(128)
    small = Splits(splits.train.subset(few), splits.validation.subset(few[:64]), splits.test.subset(few[:64]))
    return small, suggest_preprocessing(small.train, (8, 8))
