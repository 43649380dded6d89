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
class TpuCut:
    """How the loops of the TPU kernels are cut so that a generation's registers and VMEM do.

    Attributes:
        held, unroll: states in registers at once in the forward, positions in its loop's body.
        again_held, again_unroll: the same where the backward computes states again.
        back_held, back_unroll: the same where it computes their gradients.
        stretch: positions whose products of dB and dC are in VMEM at once, as a share of a span.
        eights: the most eights of positions in the body of an elementwise loop.
        back_tiles: registers of 8 positions at once in those of the backward; 8 is all of a block.
        stream_bytes: VMEM for one buffer of all blocks that are streamed; there are two.
        time_blocks: the longest of the forward and of the backward.
    """

    held: int
    unroll: int
    again_held: int
    again_unroll: int
    back_held: int
    back_unroll: int
    stretch: float
    eights: int
    back_tiles: int
    stream_bytes: int
    time_blocks: tuple[int, int]


# By static counts (docs/kernels.md): the most that spills no register.
TPU_CUT = TpuCut(
    held=8, unroll=16, again_held=6, again_unroll=32, back_held=8, back_unroll=8, stretch=1 / 2,
    eights=8, back_tiles=8, stream_bytes=4 << 20, time_blocks=(128, 64),
)  # fmt: skip
# Of a v4 and older: 32 vector registers instead of 64, and 16 MiB of VMEM instead of 64 or 128.
TPU_V4_CUT = TpuCut(
    held=4, unroll=16, again_held=4, again_unroll=16, back_held=2, back_unroll=8, stretch=1 / 4,
    eights=1, back_tiles=2, stream_bytes=1 << 20, time_blocks=(64, 64),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GpuSweep:
    """How the GPU kernels that walk through a sequence are cut (`gluon_forward`, `gluon_adjoint`).

    Attributes:
        steps, lanes: a thread's steps and a channel's lanes; a tile is steps * lanes.
        channels: of a warp; lanes * channels = 32.
        warps: of a program.
        states: whose coefficients are copied at a time, into one of two buffers.
        together: states that a warp works on at once.
        registers: the most that a thread may use; None leaves it to the compiler.
        unit: tiles of a unit (`gluon_units`); None is the whole sequence.
    """

    steps: int
    lanes: int
    channels: int
    warps: int
    states: int
    together: int
    registers: int | None = None
    unit: int | None = None

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time parameters."""
        return dict(
            K=self.steps, LANES=self.lanes, CHANNELS=self.channels, WARPS=self.warps,
            STATES=self.states, TOGETHER=self.together,
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


# H100, bf16, all operands (benchmarks/results/scan_gpu_tuning.json has the milliseconds). Each of
# a multiprocessor's four schedulers has 16384 registers: up to 255 of a thread two warps fit on
# one, up to 168 three, up to 128 four.
_FORWARD_FEW = GpuSweep(
    steps=16, lanes=16, channels=2, warps=2, states=8, together=2, registers=255
)
_FORWARD_MANY = dataclasses.replace(_FORWARD_FEW, together=1, registers=168)
_ADJOINT_FEW = GpuSweep(
    steps=16, lanes=32, channels=1, warps=4, states=4, together=1, registers=128
)
_ADJOINT_MANY = GpuSweep(
    steps=16, lanes=16, channels=2, warps=2, states=4, together=2, registers=128
)
_SCHEDULERS = 4 * 132  # of an H100
# Milliseconds at B=1 L=65536 E=2304, 256 channels a program: registers 168: 4.36, none: 4.61.
GPU_BACKWARD = GpuBackward(steps=8, lanes=8, channels=4, warps=4, states=16, registers=168)


def forward_sweep(rows: int, length: int, *, save: bool) -> GpuSweep:
    """The cut of `gluon_forward`.

    Args:
        rows: batch * channels.
        length: of a sequence.
        save: whether states are saved for the backward.
    """
    many = rows >= 3 * _SCHEDULERS * _FORWARD_MANY.channels
    sweep = _in_units(_FORWARD_MANY if many else _FORWARD_FEW, rows, length)
    return dataclasses.replace(sweep, states=4) if save else sweep


def adjoint_sweep(rows: int, length: int) -> GpuSweep:
    """The cut of `gluon_adjoint`; arguments as of `forward_sweep`."""
    many = rows >= 4 * _SCHEDULERS * _ADJOINT_MANY.channels
    return _in_units(_ADJOINT_MANY if many else _ADJOINT_FEW, rows, length)


def _in_units(sweep: GpuSweep, rows: int, length: int) -> GpuSweep:
    """A sweep with its unit, where there are more warps than fit at once, but not many times more.

    Then whole sequences would fill the last round of programs badly (`gluon_units`).
    """
    warps = -(-rows // sweep.channels)
    resident = _SCHEDULERS * (16384 // (32 * (sweep.registers or 255)))
    if warps <= resident or warps > 8 * resident:
        return sweep
    steps = min(4096, max(1024, length // 8))
    return dataclasses.replace(sweep, unit=steps // (sweep.steps * sweep.lanes))


def gpu_segments(length: int) -> int:
    """States that the GPU kernels save in a sequence: of whole tiles of either sweep."""
    tile = max(sweep.steps * sweep.lanes for sweep in (_FORWARD_FEW, _ADJOINT_FEW))
    return -(-length // tile) * (tile // GPU_BACKWARD.segment)


def channels_of_a_program(per_group: int, others: int) -> int:
    """Channels that one program of `gluon_backward` sums dB and dC over.

    More make fewer partial sums, fewer make more programs: 256, less where that leaves under 528
    programs (4 a multiprocessor of an H100).

    Args:
        per_group: channels of a group.
        others: programs in the other directions: groups * segments * batch.
    """
    block = 256
    while block > 16 and others * -(-per_group // block) < 528:
        block //= 2
    return block
