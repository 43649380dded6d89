"""What every clip of a data set has in common, and which appearances training never shows."""

from dataclasses import dataclass

import numpy as np

from storm_jax.data.drawing import COLOURS, SHAPES, digit_mask, shape_mask, tint

SLOTS = 4  # moments in a group: a group is a multiple of them long
_CELLS = 4  # positions are held out by cells of a 4 x 4 grid


@dataclass(frozen=True)
class Sprite:
    """A mask with its colour and the position of its upper left corner, in pixels."""

    mask: np.ndarray  # bool [h, w]
    colour: np.ndarray  # int [3]
    x: int
    y: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the clips, and whether they show what training holds out.

    Attributes:
      frames: in a clip, a multiple of `group`, two groups or more.
      size: side of a frame in pixels, even, at least 48.
      group: consecutive frames that a model may average, a multiple of 4. What holds for the means
        of these groups holds for the means of any whole number of them.
      held_out: False: combinations of colour and shape, and positions, that training shows. True:
        only those that it never shows.
    """

    frames: int = 8
    size: int = 48
    group: int = 4
    held_out: bool = False

    def __post_init__(self):
        if self.group < SLOTS or self.group % SLOTS:
            raise ValueError(
                f"group={self.group} must be a multiple of {SLOTS}: every group shows {SLOTS}"
                " moments, each for the same number of frames"
            )
        if self.frames % self.group or self.frames < 2 * self.group:
            raise ValueError(
                f"frames={self.frames} must be a multiple of group={self.group}, two groups or more"
            )
        if self.size < 48 or self.size % 2:
            raise ValueError(
                f"size={self.size} must be even, and at least 48 pixels: in smaller frames"
                " shapes and digits cannot be told apart for certain"
            )

    @property
    def groups(self) -> int:
        return self.frames // self.group

    # ------------------------------------------------------------------------------- appearances

    def colours_of(self, shape: str) -> list[str]:
        """Colours that the shape has in these clips."""
        return [c for c in COLOURS if _unseen(SHAPES.index(shape), c) == self.held_out]

    def subject(self, rng: np.random.Generator, other_than: str = "") -> tuple[str, str]:
        """A colour, not the one named, and a shape."""
        pairs = [(c, s) for s in SHAPES for c in self.colours_of(s) if c != other_than]
        return pairs[rng.integers(len(pairs))]

    def some_colours(self, rng: np.random.Generator, shape: str, count: int) -> list[str]:
        """Different colours for a shape: those it has in these clips, then, if too few, others."""
        own = self.colours_of(shape)
        others = [c for c in COLOURS if c not in own]
        chosen = [*rng.permutation(own), *rng.permutation(others)][:count]
        return [str(c) for c in rng.permutation(chosen)]

    def colour_of_digit(self, rng: np.random.Generator, digit: str) -> str:
        """A colour that the digit has in these clips."""
        return str(rng.choice([c for c in COLOURS if _unseen(int(digit), c) == self.held_out]))

    # --------------------------------------------------------------------------------- positions

    def place(self, rng: np.random.Generator) -> np.ndarray:
        """A position of these clips as two fractions of the room there is, float [2] in [0, 1)."""
        while True:
            (column, row), place = _inside(rng, 2)
            if ((column + 2 * row) % _CELLS == 0) == self.held_out:
                return place

    def lane(self, rng: np.random.Generator) -> float:
        """One such fraction: where across the frame something moves along it."""
        while True:
            (cell,), (lane,) = _inside(rng, 1)
            if (cell == 2) == self.held_out:
                return lane

    def shape_at(
        self, place: np.ndarray, side: int, shape: str, colour: np.ndarray, rows: float = 1.0
    ) -> Sprite:
        """A shape at such a position; `rows`: share of the frame's height, from its top."""
        room = np.array([self.size, int(self.size * rows)]) - side
        x, y = (place * (room + 1)).astype(int)
        return Sprite(shape_mask(shape, side), colour, int(x), int(y))

    def digit_at(self, place: np.ndarray, digit: str, colour: np.ndarray) -> Sprite:
        """A digit, about 0.4 of the frame high, at such a position."""
        mask = digit_mask(digit, round(0.4 * self.size / 7))
        x, y = (place * (self.size - np.array(mask.shape[::-1]) + 1)).astype(int)
        return Sprite(mask, colour, int(x), int(y))

    def side(self, rng: np.random.Generator) -> int:
        """Side of a shape in pixels, a quarter to a third of the frame."""
        return int(rng.integers(round(0.25 * self.size), round(0.34 * self.size) + 1))

    def sprite(self, rng: np.random.Generator, colour: str, shape: str) -> Sprite:
        """A shape of random exact colour, size and position."""
        return self.shape_at(self.place(rng), self.side(rng), shape, tint(rng, colour))

    def digit(self, rng: np.random.Generator, digit: str) -> Sprite:
        """A digit of random colour and position."""
        return self.digit_at(self.place(rng), digit, tint(rng, self.colour_of_digit(rng, digit)))


def _inside(rng: np.random.Generator, axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells and the fractions in them, [axes] each, well inside: no pixel belongs to two cells."""
    cells = rng.integers(_CELLS, size=axes)
    return cells, (cells + rng.uniform(0.2, 0.8, axes)) / _CELLS


def _unseen(thing: int, colour: str) -> bool:
    """Whether training never shows thing number `thing` (a shape, a digit) in this colour."""
    return thing % len(COLOURS) == list(COLOURS).index(colour)
