"""The GPU architectures that kernels are compiled for, and what their usual boards can do.

Where the figures are from:
- registers, shared memory, warps and blocks of a multiprocessor, integer lanes: CUDA C++ Programming Guide, tables of
  technical specifications and of arithmetic instructions per compute capability.
- multiprocessors, clock (boost), L2, DRAM bandwidth, tensor-core rate: NVIDIA's data sheets and architecture
  whitepapers of the board that is named; the rate is the dense fp16 one with float32 accumulation, over
  multiprocessors and clock. Thor and GB10: data sheets, and what their drivers report.
- H200: 4.3 TB/s is what was measured of the data sheet's 4.8.
- L2 to multiprocessors: 5,120 bytes per cycle in the A100 whitepaper, and taken for H200; elsewhere not published: 64
  bytes per cycle of each multiprocessor, which is as much as one can take.
- 0.5 us from one kernel of a CUDA graph to the next: NVIDIA, "Getting Started with CUDA Graphs" (3.4 us for 2.9 us of work).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU architecture, and the figures of its usual board.

    Attributes:
        capability: 90 is 9.0.
        shared_memory: bytes that one block can have.
        multiprocessors: of the board; they steer the heuristic.
        board: which one.
        clock: Hz.
        tensor_flops_per_cycle: of one multiprocessor, in 16-bit with float32 accumulation.
        integer_lanes: threads per cycle whose integer instruction one of a multiprocessor's four quarters executes.
        warps, blocks: that one multiprocessor holds at the same time.
        l2_bytes, dram_bandwidth: bytes, and bytes per second.
        l2_bytes_per_cycle: from L2 to all multiprocessors.
        launch_seconds: from the end of one kernel in a CUDA graph to the start of the next.
        registers: of one multiprocessor.
        shared_bytes_per_cycle: of one multiprocessor.
    """

    name: str
    capability: int
    shared_memory: int
    multiprocessors: int
    board: str = ""
    clock: float = 1.5e9
    tensor_flops_per_cycle: int = 512
    integer_lanes: int = 16
    warps: int = 48
    blocks: int = 16
    l2_bytes: int = 1 << 22
    dram_bandwidth: float = 1e12
    l2_bytes_per_cycle: int = 0
    launch_seconds: float = 0.5e-6
    registers: int = 65536
    shared_bytes_per_cycle: int = 128

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

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        """The system keeps 1 KiB for each block: of a single one, what is left is shared_memory."""
        return self.shared_memory + 1024

    @property
    def l2_bandwidth(self) -> float:
        """Bytes per second."""
        return self.clock * (self.l2_bytes_per_cycle or 64 * self.multiprocessors)


_KIB, _MIB = 1 << 10, 1 << 20
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 80, 163 * _KIB, 108, "A100 80 GB", 1.41e9, 2048, 16, 64, 32, 40 * _MIB, 2.039e12, 5120),
        Target("sm_86", 86, 99 * _KIB, 82, "RTX 3090", 1.695e9, 512, 16, 48, 16, 6 * _MIB, 0.936e12),
        Target("sm_87", 87, 163 * _KIB, 16, "Jetson AGX Orin 64 GB", 1.3e9, 2048, 16, 48, 16, 4 * _MIB, 0.2048e12),
        Target("sm_89", 89, 99 * _KIB, 128, "RTX 4090", 2.52e9, 512, 16, 48, 24, 72 * _MIB, 1.008e12),
        Target("sm_90", 90, 227 * _KIB, 132, "H200", 1.83e9, 4096, 16, 64, 32, 50 * _MIB, 4.3e12, 5120),
        Target("sm_120", 120, 99 * _KIB, 170, "RTX 5090", 2.407e9, 512, 32, 48, 24, 96 * _MIB, 1.792e12),
    )
}
