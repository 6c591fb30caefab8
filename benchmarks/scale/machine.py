"""How fast a GPU, its network and its processor cores are, by measurements and published figures."""

from dataclasses import dataclass

from benchmarks.scale.published import PUBLISHED


@dataclass(frozen=True)
class Speed:
    """Speed of forward and backward passes on a GPU: a pass takes a fixed time, plus its samples' work at `tflops`."""

    fixed_s: float
    tflops: float


# One H100, refine, 384x512 (docs/performance.md): bf16 from batches of 1 and 8, the others from 4 and 8.
SPEEDS = {"fp32": Speed(0.027, 26.8), "tf32": Speed(0.0129, 49.9), "bf16": Speed(0.0186, 66.2)}

# Samples per second that one core decodes and augments, from docs/data.md (python -m benchmarks.data --only loading).
LOADED_PER_CORE = {"chairs": 143.3, "sintel": 67.5, "kitti": 36.3}

# Latency of a message through switch and driver in one step of a ring; 10 µs is a generous assumption.
RING_STEP_S = 10e-6


@dataclass(frozen=True)
class Machine:
    """A GPU and its network."""

    speed: Speed

    def pass_seconds(self, samples: int, gflop_sample: float) -> float:
        """Seconds of one pass over `samples` samples."""
        return self.speed.fixed_s + self.sample_seconds(gflop_sample) * samples

    def sample_seconds(self, gflop: float) -> float:
        """Seconds that one sample adds to a pass."""
        return gflop / 1e3 / self.speed.tflops

    def all_reduce_seconds(self, size: int, world: int) -> float:
        """Seconds of a ring over the slowest link; NVLink inside a machine is many times as fast and is not counted."""
        if world == 1:
            return 0.0
        per_second = PUBLISHED.network_gbit_s_per_gpu / 8 * 1e9
        return 2 * (world - 1) / world * size / per_second + 2 * (world - 1) * RING_STEP_S
