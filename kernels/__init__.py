"""Fused operators for convolutional networks: for each its definition, its Triton kernel and how it is launched.

Importing this package registers the operators. It imports neither Triton nor touches a device: `kernels.launch`
(launching by hand) and `kernels.compile` (ahead-of-time compilation) need Triton and are imported by name.
"""

import kernels.operators  # noqa: F401  registers them
