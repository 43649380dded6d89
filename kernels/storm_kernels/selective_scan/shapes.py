"""Static tables of sizes, chosen by measurement. No size is tuned while a program runs."""

import dataclasses

# Positions in a chunk of the XLA scan. It saves one state per chunk and holds the states of one
# chunk while it runs backward.
XLA_CHUNK = {
    # Measured once, lowest of 5, on an earlier form of the steps: 8 to 32 within 4 % at L = 4096;
    # at B = 64, L = 128 8 was the best without gate and skip (81 ms, 16 and 32: 84), 16 with (94).
    "cpu": 16,
    # H100, bf16, forward and backward (benchmarks/results/scan_gpu.json): at L = 65536, E = 2304
    # 190 ms against 225 (128), 228 (64); at L = 32768, E = 7168 all of 32 to 256 within 7 %.
    "gpu": 256,
    # Not run. The compiler's own estimates for one v5e (libtpu 0.0.42.1), forward, bf16, L = 8192,
    # E = 2304, in millions of cycles: 58 (16), 52 (32), 49 (64), 48 (128), 55 (256), 59 (512).
    "tpu": 128,
}


def default_chunk(platform: str) -> int:
    """The chunk of the XLA scan on a platform as `platform_of` names it."""
    return XLA_CHUNK.get(platform, XLA_CHUNK["gpu"])


@dataclasses.dataclass(frozen=True)
class GpuSweep:
    """How the GPU kernels that walk through a sequence are cut (`gluon_forward`, `gluon_adjoint`).

    Attributes:
        steps, lanes: a thread's steps and a channel's lanes; a tile is steps * lanes.
        channels: of a warp; lanes * channels = 32.
        warps: of a program.
        slots, states: slots of the ring of coefficients, and states in each.
        together: states that a warp works on at once.
        registers: the most that a thread may use; None leaves it to the compiler.
    """

    steps: int
    lanes: int
    channels: int
    warps: int
    slots: int
    states: int
    together: int
    registers: int | None = None

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time parameters."""
        return dict(
            K=self.steps, LANES=self.lanes, CHANNELS=self.channels, WARPS=self.warps,
            SLOTS=self.slots, STATES=self.states, TOGETHER=self.together,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GpuBackward:
    """How `gluon_backward` is cut.

    Attributes:
        steps, lanes, channels: as in `GpuSweep`.
        warps: of a program; they share the states, which are a multiple of them.
        states: how many at most go through the kernel at a time.
        registers: as in `GpuSweep`.
    """

    steps: int
    lanes: int
    channels: int
    warps: int
    states: int
    registers: int | None = None

    @property
    def segment(self) -> int:
        """Steps between two saved states."""
        return self.steps * self.lanes

    def constants(self) -> dict[str, int]:
        """The kernel's compile-time parameters."""
        return dict(K=self.steps, LANES=self.lanes, CHANNELS=self.channels, WARPS=self.warps)


# H100, bf16, all operands, medians in ms (benchmarks/results/scan_gpu_tuning.json). Each of a
# multiprocessor's four schedulers has 16384 registers: up to 168 of a thread three warps fit on
# one, up to 128 four. Without a limit the compiler takes a few more than 168 and loses a third.
#   B=1 L=65536 E=2304 (2.2 warps a scheduler): 168: 1.89, none: 2.48, 224: 2.24; 4 warps: 2.04
#   B=1 L=32768 E=7168 (6.8): 128: 2.43, none: 2.64, 1 warp and 168: 2.85, 4 warps and 128: 2.45
_SWEEP_FEW = GpuSweep(
    steps=16, lanes=16, channels=2, warps=2, slots=3, states=4, together=1, registers=168
)
_SWEEP_MANY = dataclasses.replace(_SWEEP_FEW, registers=128)
# The adjoint's sweep, ms with one, two and four states at once: 1.58, 1.44, 1.43; second shape 1.72
# and 1.61 with one and two. Forward there is no difference.
ADJOINT_TOGETHER = 2
# The same, first shape: lanes 8: 5.55, 16: 6.01, 32: 6.21; 8 warps and 128 registers: 8.99.
GPU_BACKWARD = GpuBackward(steps=8, lanes=8, channels=4, warps=4, states=16)


def gpu_sweep(rows: int) -> GpuSweep:
    """The cut of the sweeps.

    Args:
        rows: batch * channels.
    """
    return _SWEEP_MANY if rows > 3 * 4 * 132 * _SWEEP_FEW.channels else _SWEEP_FEW


def channels_of_a_program(per_group: int, others: int) -> int:
    """Channels that one program of `gluon_backward` sums dB and dC over.

    More make fewer partial sums, fewer make more programs: 128, less where that leaves under 528
    programs (4 a multiprocessor of an H100).

    Args:
        per_group: channels of a group.
        others: programs in the other directions: groups * segments * batch.
    """
    block = 128
    while block > 8 and others * -(-per_group // block) < 528:
        block //= 2
    return block
