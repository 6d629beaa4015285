"""Graph passes: pure functions from a graph to a graph.

First the passes of FOLDING, in this order, then those of one level of fusion in LEVELS.
"""

from __future__ import annotations

from export.fusion.passes.channels_last import channels_last
from export.fusion.passes.fold_batchnorm import fold_batchnorm
from export.fusion.passes.fold_constants import fold_constants
from export.fusion.passes.fuse_bottleneck import fuse_bottleneck
from export.fusion.passes.fuse_epilogue import fuse_epilogue
from export.fusion.passes.fuse_head import fuse_head
from export.fusion.passes.fuse_stem import fuse_stem
from export.fusion.passes.merge_branches import merge_branches
from export.fusion.passes.merge_projection import merge_projection
from export.fusion.passes.name_activations import name_activations
from export.fusion.passes.pool_as_mean import pool_as_mean

FOLDING = (fold_constants, name_activations, fold_batchnorm, merge_branches, pool_as_mean)

# In the order they are applied, each with the first level that has it.
_FUSIONS = (
    (fuse_epilogue, "b"),
    (fuse_stem, "c1"),
    (merge_projection, "c2"),
    (fuse_bottleneck, "c3"),
    (fuse_head, "c1"),
)
# b: convolutions with their epilogues; c1: also stem and head; c2: also merged projections; c3: also bottlenecks.
LEVELS = {
    level: (*(fusion for fusion, first in _FUSIONS if first <= level), channels_last)
    for level in ("b", "c1", "c2", "c3")
}
DEFAULT_LEVEL = "c3"
QUANTISED_LEVEL = "b"  # each convolution on its own: what is quantised lies between them

__all__ = [
    "DEFAULT_LEVEL",
    "FOLDING",
    "LEVELS",
    "channels_last",
    "fold_batchnorm",
    "fold_constants",
    "fuse_bottleneck",
    "fuse_epilogue",
    "fuse_head",
    "fuse_stem",
    "merge_branches",
    "merge_projection",
    "name_activations",
    "pool_as_mean",
]
