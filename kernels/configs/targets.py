"""The GPU architectures that kernels are compiled for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU architecture: compute capability (90 = 9.0), shared memory per block in bytes, multiprocessors."""

    name: str
    capability: int
    shared_memory: int
    multiprocessors: int

    @property
    def has_wgmma(self) -> bool:
        return self.capability == 90

    @property
    def has_tma(self) -> bool:
        return self.capability >= 90

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch."""
        return self.capability >= 90


# The multiprocessor count is that of the usual board and only steers the heuristic.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 80, 163 * 1024, 108),
        Target("sm_86", 86, 99 * 1024, 82),
        Target("sm_87", 87, 163 * 1024, 16),
        Target("sm_89", 89, 99 * 1024, 128),
        Target("sm_90", 90, 227 * 1024, 132),
        Target("sm_120", 120, 99 * 1024, 170),
    )
}
