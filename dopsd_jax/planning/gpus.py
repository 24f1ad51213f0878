"""GPUs as XLA needs to know them in order to compile for one that is not there.

Numbers: the data sheets of NVIDIA's cards and the tables of compute capabilities in the CUDA C++
programming guide; bytes of memory as cards of 80 and 40 GB report them to XLA, and others to
nvidia-smi.
"""

from __future__ import annotations

import dataclasses

# The same for every card since compute capability 7.0.
_COMMON = """\
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
"""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: As it names itself to JAX.
        capability: Compute capability, (major, minor).
        cores: Streaming multiprocessors.
        lanes: float32 units in each of them.
        threads: That one of them holds.
        shared: Bytes of shared memory of one of them; a block may have 1 KiB less.
        memory, bandwidth: Bytes, and bytes per second of them.
        l2: Bytes of the second cache.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: int
    memory: int
    bandwidth: float
    l2: int
    clock: float

    def target(self) -> str:
        """XLA's description of the device, stream_executor.GpuTargetConfigProto as text."""
        major, minor = self.capability
        return f"""gpu_device_info {{
{_COMMON}  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  threads_per_core_limit: {self.threads}
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - 1024}
  device_memory_size: {self.memory}
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "{self.name}"
"""


_MIB = 2**20
_HOPPER = {"capability": (9, 0), "cores": 132, "lanes": 128, "threads": 2048,
           "shared": 228 * 1024, "l2": 50 * _MIB, "clock": 1.98}
_AMPERE = {"capability": (8, 0), "cores": 108, "lanes": 64, "threads": 2048,
           "shared": 164 * 1024, "l2": 40 * _MIB, "clock": 1.41}
_GA10X = {"capability": (8, 6), "lanes": 128, "threads": 1536, "shared": 100 * 1024}
_ADA = {"capability": (8, 9), "lanes": 128, "threads": 1536, "shared": 100 * 1024}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=84929347584, bandwidth=3352.32e9, **_HOPPER),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", memory=151397597184, bandwidth=4800e9, **_HOPPER),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", memory=85100068864, bandwidth=2039.04e9, **_AMPERE),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", memory=42331013120, bandwidth=1555.2e9, **_AMPERE),
    "l40s": Gpu("NVIDIA L40S", cores=142, memory=46068 * _MIB, bandwidth=864e9, l2=96 * _MIB,
                clock=2.52, **_ADA),
    "4090": Gpu("NVIDIA GeForce RTX 4090", cores=128, memory=24564 * _MIB, bandwidth=1008e9,
                l2=72 * _MIB, clock=2.52, **_ADA),
    "3090": Gpu("NVIDIA GeForce RTX 3090", cores=82, memory=24576 * _MIB, bandwidth=936.2e9,
                l2=6 * _MIB, clock=1.695, **_GA10X),
    "4080": Gpu("NVIDIA GeForce RTX 4080", cores=76, memory=16376 * _MIB, bandwidth=716.8e9,
                l2=64 * _MIB, clock=2.505, **_ADA),
    "4070": Gpu("NVIDIA GeForce RTX 4070", cores=46, memory=12282 * _MIB, bandwidth=504.2e9,
                l2=36 * _MIB, clock=2.475, **_ADA),
    "3060": Gpu("NVIDIA GeForce RTX 3060", cores=28, memory=12288 * _MIB, bandwidth=360e9,
                l2=3 * _MIB, clock=1.777, **_GA10X),
}
