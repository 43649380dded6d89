"""The families of questions, what each claims, and the frames that go with each answer.

A family asks first and acts then. The question does not depend on the answer, and every question
is asked about as many clips as it has options, once with each of them as the answer: the question
alone says nothing. `act` draws the contents of all frames without regard to the answer, then the
order in which they are shown, and only the order depends on the answer. So

* a frame drawn at random has the same distribution for every answer. (A frame whose place in its
  group is known need not: who sees the object at the left in the first frame of a motion knows
  that it will move right. A baseline of one frame must draw it at random.)
* where the order changes within groups only, the mean of every group is the same for every answer.

The four families in which a frame at random helps claim nothing about time, or, `needle`, only that
few frames are not enough.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from storm_jax.data.controlled.layout import SLOTS, Layout, Sprite
from storm_jax.data.drawing import COLOURS, DIGITS, SHAPES, shape_mask, tint

Contents = tuple[Sprite, ...]  # of one frame, besides the background


@dataclass(frozen=True)
class Question:
    """A question with its options, and what it is about.

    Attributes:
      text: with the options in it, as the model reads it.
      options: their texts, in the order of the question.
      subjects: (colour, shape) of the objects it names.
      colours: that the object shows, where the question lists them.
      number: of the frame or part that is asked about, from 0.
    """

    text: str
    options: tuple[str, ...]
    subjects: tuple[tuple[str, str], ...] = ()
    colours: tuple[str, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class Script:
    """Contents of the frames and the order of showing them.

    Attributes:
      contents: of each frame, [F]; independent of the answer.
      order: int [F], a permutation: frame t shows contents[order[t]].
    """

    contents: list[Contents]
    order: np.ndarray


class Family(ABC):
    """A kind of question.

    Attributes:
      name: the record's field "task".
      needs_time: neither the question nor a frame at random tells more than chance.
      needs_mixing: nor do the means of all groups, in order.
      needs_coverage: a frame at random tells more than chance only if it is one of the few that
        show the answer.
    """

    name: ClassVar[str]
    needs_time: ClassVar[bool] = False
    needs_mixing: ClassVar[bool] = False
    needs_coverage: ClassVar[bool] = False

    @abstractmethod
    def ask(self, rng: np.random.Generator, layout: Layout) -> Question: ...

    @abstractmethod
    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        """Frames for the option number `answer`.

        `rng` is read in the same way for every answer until the contents are complete.
        """


class Direction(Family):
    """Moves across most of the frame within one group, and is nowhere to be seen in the others.

    Standing still where the motion ends would give the answer away.
    """

    name = "direction"
    needs_time = needs_mixing = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        words = rng.permutation((("left", "right"), ("up", "down"))[rng.integers(2)])
        subject = layout.subject(rng)
        text = f"Did the {_named(subject)} move {words[0]} or {words[1]}?"
        return Question(text, (str(words[0]), str(words[1])), (subject,))

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        ((colour, shape),) = question.subjects
        word, exact, side = question.options[answer], tint(rng, colour), layout.side(rng)
        first = layout.group * int(rng.integers(layout.groups))
        travel = rng.uniform(0.45, 0.6) * layout.size
        across = layout.lane(rng)
        along = rng.random() * (layout.size - side - travel) + np.linspace(0, travel, layout.group)
        contents = _empty(layout)
        for i, position in enumerate(np.rint(along).astype(int).tolist()):
            other = int(across * (layout.size - side + 1))
            x, y = (position, other) if word in ("left", "right") else (other, position)
            contents[first + i] = (Sprite(shape_mask(shape, side), exact, x, y),)
        order = np.arange(layout.frames)
        if word in ("left", "up"):
            order[first : first + layout.group] = order[first : first + layout.group][::-1]
        return Script(contents, order)


class Order(Family):
    """Two objects, each visible in a group of its own."""

    name = "order"
    needs_time = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        return _which_of_two(rng, layout, "Which came first,")

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        contents = _empty(layout)
        when = np.sort(rng.permutation(layout.groups)[:2])
        for subject, g in zip(question.subjects, when, strict=True):
            sprite = layout.sprite(rng, *subject)
            contents[_group(layout, g)] = [(sprite,)] * layout.group
        return Script(contents, _swapped(layout, when) if answer else np.arange(layout.frames))


class Blink(Family):
    """Two objects, each visible for a moment of the same group."""

    name = "blink"
    needs_time = needs_mixing = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        return _which_of_two(rng, layout, "Which blinked first,")

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        contents = _empty(layout)
        start, step = layout.group * int(rng.integers(layout.groups)), layout.group // SLOTS
        when = start + step * np.sort(rng.permutation(SLOTS)[:2])
        for subject, t in zip(question.subjects, when, strict=True):
            contents[t : t + step] = [(layout.sprite(rng, *subject),)] * step
        order = np.arange(layout.frames)
        if answer:
            a, b = (slice(t, t + step) for t in when)
            order[a], order[b] = order[b].copy(), order[a].copy()
        return Script(contents, order)


class Count(Family):
    """Flashes in two groups: lit during half the frames of each, together or apart."""

    name = "count"
    needs_time = needs_mixing = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        subject = layout.subject(rng)
        options = ("2", "3", "4")
        return _list(f"How many times did the {_named(subject)} flash", options, (subject,))

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        sprite = layout.sprite(rng, *question.subjects[0])
        contents = _empty(layout)
        chosen = np.sort(rng.permutation(layout.groups)[:2])
        for g in chosen:
            half = layout.group // 2
            contents[_group(layout, g)] = [(sprite,)] * half + [()] * half
        # All ways to light two of four moments in both groups that make as many flashes as asked.
        ways = []
        for pair in np.ndindex(len(_TWO_OF_FOUR), len(_TWO_OF_FOUR)):
            lit = np.zeros(layout.groups * SLOTS, int)
            for g, pattern in zip(chosen, pair, strict=True):
                lit[g * SLOTS : (g + 1) * SLOTS] = _TWO_OF_FOUR[pattern]
            if (np.diff(lit, prepend=0) == 1).sum() == int(question.options[answer]):
                ways.append(pair)
        order = np.arange(layout.frames)
        for g, pattern in zip(chosen, ways[rng.integers(len(ways))], strict=True):
            lit_first = np.argsort(1 - _TWO_OF_FOUR[pattern], kind="stable")
            _arrange(order, layout, g, np.argsort(lit_first).tolist())
        return Script(contents, order)


class State(Family):
    """Shows four colours one after the other, within one group."""

    name = "state"
    needs_time = needs_mixing = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        shape = str(rng.choice(SHAPES))
        before, *options = layout.some_colours(rng, shape, SLOTS)
        text = f"Which colour did the {shape} turn right after {before}"
        return _list(text, options, ((before, shape),), (before, *options))

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        contents = _empty(layout)
        g = int(rng.integers(layout.groups))
        contents[_group(layout, g)] = _colours_in_turn(question, rng, layout)
        # The other two colours stand before, after or around the pair that is asked for.
        others = [c for c in range(1, SLOTS) if c != answer + 1]
        sequence = [int(c) for c in rng.permutation(others)]
        at = int(rng.integers(len(sequence) + 1))
        sequence[at:at] = [0, answer + 1]
        order = np.arange(layout.frames)
        _arrange(order, layout, g, sequence)
        return Script(contents, order)


class Speed(Family):
    """Two objects jump to and fro in all groups, one of them twice as often as the other.

    Both are half of the time at either end, and all four combinations of ends are equally frequent
    in every group.
    """

    name = "speed"
    needs_time = needs_mixing = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        return _which_of_two(rng, layout, "Which moved faster,")

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        ends = []
        for half, subject in zip(rng.permutation(2), question.subjects, strict=True):
            sprite = layout.shape_at(
                layout.place(rng) * [0.3, 1.0],
                round(0.25 * layout.size),
                subject[1],
                tint(rng, subject[0]),
                rows=0.5,
            )
            top, jump = int(half) * layout.size // 2, round(0.4 * layout.size)
            ends.append(
                [
                    Sprite(sprite.mask, sprite.colour, sprite.x + end * jump, sprite.y + top)
                    for end in (0, 1)
                ]
            )
        step, contents = layout.group // SLOTS, []
        for slow, fast in _ENDS * layout.groups:
            contents += [(ends[0][slow], ends[1][fast])] * step
        flip = rng.integers(2, size=2)
        order = np.arange(layout.frames)
        pairs = [(s ^ flip[0], f ^ flip[1]) for s, f in _ENDS]  # the second object is the fast one
        if answer == 0:
            pairs = [(f ^ flip[0], s ^ flip[1]) for s, f in _ENDS]
        for g in range(layout.groups):
            _arrange(order, layout, g, [2 * int(a) + int(b) for a, b in pairs])
        return Script(contents, order)


class Frame(Family):
    """Shows four colours in random order in every group, all equally often."""

    name = "frame"
    needs_time = needs_mixing = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        shape, number = str(rng.choice(SHAPES)), int(rng.integers(layout.frames))
        options = layout.some_colours(rng, shape, SLOTS)
        text = f"Which colour is the {shape} in frame {number + 1} of {layout.frames}"
        return _list(text, options, (("", shape),), options, number)

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        contents = _colours_in_turn(question, rng, layout) * layout.groups
        group, step = layout.group, layout.group // SLOTS
        order = np.concatenate([g * group + rng.permutation(group) for g in range(layout.groups)])
        there = question.number // group * group
        # A frame of that group with the colour changes places with the frame that is asked about.
        shown = (order[there : there + group] - there) // step
        other = there + int(rng.choice(np.flatnonzero(shown == answer)))
        if order[question.number] // step != order[other] // step:
            order[[question.number, other]] = order[[other, question.number]]
        return Script(contents, order)


class Part(Family):
    """Has a colour of its own in each part of the clip: halves, or quarters from four groups on."""

    name = "part"
    needs_time = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        shape = str(rng.choice(SHAPES))
        parts, word = (4, "quarter") if layout.groups >= 4 else (2, "half")
        options = layout.some_colours(rng, shape, parts)
        number = int(rng.integers(parts))
        which = ("first", "second", "third")[number] if number < parts - 1 else "last"
        text = f"Which colour was the {shape} in the {which} {word}"
        return _list(text, options, (("", shape),), options, number)

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        (_, shape), parts = question.subjects[0], len(question.colours)
        edges = np.linspace(0, layout.groups, parts + 1).astype(int)
        many = int(np.diff(edges).min())
        when = [a + rng.permutation(b - a)[:many] for a, b in zip(edges, edges[1:], strict=False)]
        place, side = layout.place(rng), layout.side(rng)
        contents = _empty(layout)
        shown = rng.permutation(parts)
        for groups, c in zip(when, shown, strict=True):
            exact = tint(rng, question.colours[c])
            for g in groups:
                sprite = layout.shape_at(place, side, shape, exact)
                contents[_group(layout, g)] = [(sprite,)] * layout.group
        order = np.arange(layout.frames)
        there = list(shown).index(answer)
        if there != question.number:
            for pair in zip(when[there], when[question.number], strict=True):
                order = order[_swapped(layout, pair)]
        return Script(contents, order)


class Needle(Family):
    """A digit, visible for half a group at a random time.

    A frame at random shows it with probability group / 2 / frames, and tells nothing otherwise.
    """

    name = "needle"
    needs_coverage = True

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        return _list("Which digit appeared for a moment", rng.permutation(list(DIGITS))[:4])

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        contents = _empty(layout)
        shown = layout.group // 2
        start = layout.group * int(rng.integers(layout.groups))
        start += int(rng.integers(layout.group - shown + 1))
        contents[start : start + shown] = [(layout.digit(rng, question.options[answer]),)] * shown
        return Script(contents, np.arange(layout.frames))


class Shape(Family):
    """An object of any colour, at another place in every group."""

    name = "shape"

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        return _list("Which shape is visible", rng.permutation(SHAPES)[:4])

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        shape = question.options[answer]
        return _roaming(rng, layout, str(rng.choice(layout.colours_of(shape))), shape)


class Colour(Family):
    """An object of any shape, at another place in every group."""

    name = "colour"

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        return _list("Which colour is the object", rng.permutation(list(COLOURS))[:4])

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        colour = question.options[answer]
        shapes = [shape for shape in SHAPES if colour in layout.colours_of(shape)]
        return _roaming(rng, layout, colour, str(rng.choice(shapes)))


class Digit(Family):
    """A digit, at another place in every group."""

    name = "digit"

    def ask(self, rng: np.random.Generator, layout: Layout) -> Question:
        return _list("Which digit is visible", rng.permutation(list(DIGITS))[:4])

    def act(
        self, question: Question, answer: int, rng: np.random.Generator, layout: Layout
    ) -> Script:
        digit = question.options[answer]
        exact = tint(rng, layout.colour_of_digit(rng, digit))
        contents = []
        for _ in range(layout.groups):
            contents += [(layout.digit_at(layout.place(rng), digit, exact),)] * layout.group
        return Script(contents, np.arange(layout.frames))


# The table: claims are the classes' attributes.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Direction(),
        Order(),
        Count(),
        Needle(),
        Shape(),
        Colour(),
        Blink(),
        State(),
        Speed(),
        Frame(),
        Part(),
        Digit(),
    )
}


# ----------------------------------------------------------------------------------------- helpers

_TWO_OF_FOUR = np.array(
    [(1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1)]
)
_ENDS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # of a slow object and a fast one, in turn


def _named(subject: tuple[str, str]) -> str:
    return " ".join(subject)


def _list(
    text: str,
    options: Iterable[object],
    subjects: Iterable[tuple[str, str]] = (),
    colours: Iterable[str] = (),
    number: int = 0,
) -> Question:
    texts = tuple(str(option) for option in options)
    text = f"{text}: {', '.join(texts[:-1])} or {texts[-1]}?"
    return Question(text, texts, tuple(subjects), tuple(colours), number)


def _which_of_two(rng: np.random.Generator, layout: Layout, text: str) -> Question:
    one = layout.subject(rng)
    two = layout.subject(rng, other_than=one[0])
    text = f"{text} the {_named(one)} or the {_named(two)}?"
    return Question(text, (_named(one), _named(two)), (one, two))


def _empty(layout: Layout) -> list[Contents]:
    return [()] * layout.frames


def _group(layout: Layout, g: int) -> slice:
    return slice(g * layout.group, (g + 1) * layout.group)


def _swapped(layout: Layout, pair: Iterable[int]) -> np.ndarray:
    """The order of frames in which two groups have changed places."""
    order = np.arange(layout.frames)
    a, b = (_group(layout, g) for g in pair)
    order[a], order[b] = order[b].copy(), order[a].copy()
    return order


def _arrange(order: np.ndarray, layout: Layout, g: int, moments: Sequence[int]) -> None:
    """Lets group g show its four moments in another sequence, in place."""
    step = layout.group // SLOTS
    first = g * layout.group
    for k, moment in enumerate(moments):
        at = first + k * step
        order[at : at + step] = np.arange(step) + first + moment * step


def _colours_in_turn(
    question: Question, rng: np.random.Generator, layout: Layout
) -> list[Contents]:
    """A group's frames with the shape in the question's four colours, one after the other."""
    ((_, shape),) = question.subjects
    place, side = layout.place(rng), layout.side(rng)
    contents = []
    for colour in question.colours:
        sprite = layout.shape_at(place, side, shape, tint(rng, colour))
        contents += [(sprite,)] * (layout.group // SLOTS)
    return contents


def _roaming(rng: np.random.Generator, layout: Layout, colour: str, shape: str) -> Script:
    """The shape in every frame, at another place in every group."""
    exact, side, contents = tint(rng, colour), layout.side(rng), []
    for _ in range(layout.groups):
        sprite = layout.shape_at(layout.place(rng), side, shape, exact)
        contents += [(sprite,)] * layout.group
    return Script(contents, np.arange(layout.frames))
