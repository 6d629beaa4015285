"""Graph passes: pure functions from a graph to a graph, applied in this order."""

from __future__ import annotations

from export.passes.channels_last import channels_last
from export.passes.fold_batchnorm import fold_batchnorm
from export.passes.fold_constants import fold_constants
from export.passes.fuse_epilogue import fuse_epilogue
from export.passes.pool_as_mean import pool_as_mean

PASSES = (fold_constants, fold_batchnorm, fuse_epilogue, pool_as_mean, channels_last)

__all__ = ["PASSES", "channels_last", "fold_batchnorm", "fold_constants", "fuse_epilogue", "pool_as_mean"]
