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
- 0.5 us from one kernel of a CUDA graph to the next: NVIDIA, "Getting Started with CUDA Graphs": 3.4 us a kernel of
  2.9 us.
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
        integer_lanes, float_lanes: threads per cycle whose instruction one of a multiprocessor's quarters executes.
        warps, blocks: that one multiprocessor holds at the same time.
        l2_bytes, dram_bandwidth: bytes, and bytes per second.
        l2_bytes_per_cycle: from L2 to all multiprocessors.
        launch_seconds: from the end of one kernel in a CUDA graph to the start of the next.
        registers: of one multiprocessor.
        oldest_triton: that compiles for it, as `compile_kernels.py --list-targets` finds out.
    """

    name: str
    capability: int
    shared_memory: int
    multiprocessors: int
    board: str = ""
    clock: float = 1.5e9
    tensor_flops_per_cycle: int = 512
    integer_lanes: int = 16
    float_lanes: int = 32
    warps: int = 48
    blocks: int = 16
    l2_bytes: int = 1 << 22
    dram_bandwidth: float = 1e12
    l2_bytes_per_cycle: int = 0
    launch_seconds: float = 0.5e-6
    registers: int = 65536
    oldest_triton: tuple[int, int] = (3, 6)

    @property
    def has_wgmma(self) -> bool:
        return self.capability == 90

    def matrix_instruction(self, rows: int) -> str:
        """What multiplies 16-bit tiles of so many rows: below 64 all use the instruction of the oldest."""
        newest = "HGMMA" if self.has_wgmma else "UTCHMMA" if 100 <= self.capability < 120 else "HMMA"
        return newest if rows >= 64 else "HMMA"

    @property
    def barrier_bytes(self) -> int:
        """Of a block's shared memory, what the barriers of products in tensor memory may take."""
        return 1024 if 100 <= self.capability < 120 else 0

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
        Target("sm_80", 80, 163 * _KIB, 108, "A100 80 GB", 1.41e9, 2048, 16, 16, 64, 32, 40 * _MIB, 2.039e12, 5120),
        Target("sm_86", 86, 99 * _KIB, 82, "RTX 3090", 1.695e9, 512, 16, 32, 48, 16, 6 * _MIB, 0.936e12),
        Target("sm_87", 87, 163 * _KIB, 16, "AGX Orin 64 GB", 1.3e9, 2048, 16, 32, 48, 16, 4 * _MIB, 0.2048e12),
        Target("sm_89", 89, 99 * _KIB, 128, "RTX 4090", 2.52e9, 512, 16, 32, 48, 24, 72 * _MIB, 1.008e12),
        Target("sm_90", 90, 227 * _KIB, 132, "H200", 1.83e9, 4096, 16, 32, 64, 32, 50 * _MIB, 4.3e12, 5120),
        Target("sm_100", 100, 227 * _KIB, 148, "B200", 1.85e9, 8192, 32, 32, 64, 32, 126 * _MIB, 8e12),
        Target(
            "sm_110", 110, 227 * _KIB, 20, "Jetson AGX Thor", 1.57e9, 8192, 32, 32, 48, 24, 32 * _MIB, 0.273e12,
            oldest_triton=(3, 8),
        ),
        Target("sm_120", 120, 99 * _KIB, 170, "RTX 5090", 2.407e9, 512, 32, 32, 48, 24, 96 * _MIB, 1.792e12),
        Target("sm_121", 121, 99 * _KIB, 48, "DGX Spark", 2.525e9, 512, 32, 32, 48, 24, 24 * _MIB, 0.273e12),
    )
}  # fmt: skip
# Why others are not here.
REFUSED = {
    "sm_75": "Triton compiles matrix products to its FMA units alone, not to tensor cores, and does not say so",
}
