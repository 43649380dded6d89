"""The shapes that scans are compared at: named sets, and those that a user writes."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Shape:
    """One problem size. Axis letters: B batch, E channels, L length, G SSM state, K groups.

    Attributes:
        batch, channels, length, state: the sizes.
        groups: groups of B and C, which then have an axis for them; None: B and C have none.
        inputs: what the operands are drawn from, see `operands.operands`: "model" has the decays
            and step sizes of Mamba's own initialisation, "mamba_ssm" those of mamba_ssm's tests.
    """

    batch: int
    channels: int
    length: int
    state: int = 16
    groups: int | None = None
    inputs: Literal["model", "mamba_ssm"] = "model"

    def __str__(self) -> str:
        groups = "" if self.groups is None else f" K{self.groups}"
        return f"B{self.batch} E{self.channels} L{self.length} G{self.state}{groups}"

    def at_most(self, batch: int | None = None, length: int | None = None) -> "Shape":
        """The same with the batch and the length cut to these; None cuts nothing."""
        return dataclasses.replace(
            self,
            batch=self.batch if batch is None else min(batch, self.batch),
            length=self.length if length is None else min(length, self.length),
        )


SETS: dict[str, tuple[Shape, ...]] = {
    # Widths below 3584. 2304 channels are twice the width of SigLIP-So400m (1152), 4608 twice that
    # of Gemma 2 2B, 5120 twice that of Gemma 3 4B. 256 tokens a frame: 65,536 positions are 256
    # frames. The last two rows have a large batch of short sequences instead.
    "storm_4b": (
        Shape(1, 2304, 65536),
        Shape(1, 5120, 32768),
        Shape(1, 2304, 8192),
        Shape(2, 4608, 16384),
        Shape(8, 2048, 4096),
        Shape(32, 2304, 1024),
    ),
    # Twice the width of Qwen2 7B and Gemma 2 9B (3584), at 128 frames, and at 64.
    "storm_7b": (Shape(1, 7168, 32768), Shape(1, 7168, 16384)),
    # tests/ops/test_selective_scan.py of mamba_ssm at e9594ce, its commented lengths included.
    "mamba_ssm_tests": tuple(
        Shape(2, 4, length, 8, groups, "mamba_ssm")
        for length in (8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096)
        for groups in (1, 2)
    ),
}
"""Named sets. The first two together hold every shape at which mamba_ssm was measured."""


def parse_shape(text: str) -> Shape:
    """Reads "batch,channels,length[,state[,groups]]".

    Raises:
        ValueError: it is something else; the message says what is expected.
    """
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not 3 <= len(sizes) <= 5 or min(sizes) < 1:
        raise ValueError(
            f"{text!r} is not a shape; expected batch,channels,length[,state[,groups]], for "
            "example 1,2304,65536 or 2,4,372,8,2, all of them at least 1"
        )
    shape = Shape(*sizes)  # pyrefly: ignore[bad-argument-type]
    if shape.groups is not None and shape.channels % shape.groups:
        raise ValueError(
            f"{text!r} is not a shape: {shape.channels} channels are no multiple of its "
            f"{shape.groups} groups"
        )
    return shape
