"""How the ranges of an 8-bit network can be found, by the names that settings and flags use. No PyTorch."""

METHODS = ("percentile", "entropy", "minmax")
DEFAULT_METHOD = METHODS[0]
