"""Answers requests that come and go, in the rows of one cache.

A request is prefilled by itself into a free row; all rows that run are decoded together. One thread
calls the engine.

Prompts are padded to a few lengths, and each has a program of its own: `can_admit`, `can_extend`
and `can_encode` say whether it is there, and have it compiled beside where it is not, for a caller
who has something else to do meanwhile. Without them the call itself compiles.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import VISUAL
from storm_jax.inference.cache import empty_cache
from storm_jax.inference.decode import Rows, begin, decode, no_rows
from storm_jax.inference.load import LoadedModel
from storm_jax.inference.options import Options
from storm_jax.inference.prefill import AS_TRAINED, Encoder, Visual, bucket
from storm_jax.inference.programs import Family, Programs, described
from storm_jax.inference.sampling import Sampling, Wishes
from storm_jax.inference.vit import compiler_options
from storm_jax.parallel.sharding import shard

STEPS = 32  # tokens of each row that `step` adds at most
_FEW = 8  # and at least, if nobody wants fewer
_CALL = 0.06  # seconds of a call: many times what it costs itself, few for who waits for its end
_PIECE = 512  # tokens that `extend` computes at a time, since their scores are all there
_SHORTEST = 32  # prompts are padded to this at least


class ContextError(ValueError):
    """A prompt that is too long for the context.

    Attributes:
      needed: tokens of the prompt, and one for an answer.
      available: tokens that the context holds.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(
            f"the prompt and one token of an answer need {needed} tokens, but the context holds"
            f" {available}: take fewer frames or a larger context"
        )
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class Progress:
    """What `Engine.step` did for one request.

    Attributes:
      slot: its row, as `admit` returned it.
      tokens: new token ids; a stop token is not among them.
      finish: "stop": a stop token was chosen; "length": no more tokens are allowed, or fit; "": the
        answer goes on.
      finite: whether every score of the answer so far was; where one was not, nothing can be said
        about the tokens.
    """

    slot: int
    tokens: list[int]
    finish: Literal["", "stop", "length"]
    finite: bool


@dataclass
class _Slot:
    """What the host knows about a row."""

    length: int = 0  # tokens in its cache when it is not running
    first: bool = False  # the token that `admit` chose was not returned yet
    running: bool = False
    behind: list[int] = field(default_factory=list)  # returned, not yet in the cache


class Engine:
    """`slots` answers at a time, each with its prompt in at most `context` tokens."""

    def __init__(self, loaded: LoadedModel, *, slots: int, context: int):
        self.loaded = loaded
        self.context = context
        self.programs = Programs(loaded.mesh)
        self.encode_frames = Encoder(loaded, self.programs)
        self._free = list(range(slots - 1, -1, -1))
        self._slots: dict[int, _Slot] = {}
        self._pace = _CALL  # seconds of one step of a call
        decoder = loaded.decoder
        self._weights = loaded.weights.of_decoder()
        large_products = compiler_options(loaded.mesh)
        config = loaded.config.model.decoder
        with jax.set_mesh(loaded.mesh):
            dtype = jnp.dtype(loaded.config.model.dtype)
            # As the programs below return them, so that the first call is compiled once.
            self._cache = jax.jit(lambda: empty_cache(config, slots, context, dtype))()
            self._rows = jax.jit(lambda: no_rows(slots, config.vocab_size))()
            # Visual tokens of the prompt that is being computed, so that their number makes no
            # further programs.
            shape = (context, config.width)
            self._visual = jax.jit(lambda: shard(jnp.zeros(shape, dtype), None, None))()

        def seen(tokens, count):
            there = (jnp.arange(len(tokens)) < count) & (tokens != VISUAL)
            ids = jnp.where(there, tokens, config.vocab_size)
            return jnp.zeros(config.vocab_size, bool).at[ids].set(True, mode="drop")

        @functools.partial(jax.jit, donate_argnums=0)
        def place(all_VD, tokens_VD, at, count):
            j = jnp.arange(len(tokens_VD))
            where = jnp.where(j < count, at + j, len(all_VD))
            return all_VD.at[where].set(tokens_VD.astype(all_VD.dtype), mode="drop")

        @functools.partial(jax.jit, donate_argnums=(1, 2), compiler_options=large_products)
        def fill(weights, cache, rows, row, tokens, count, visual, limit, wishes):
            scores, cache = decoder.prefill(weights, cache, row, tokens, count, visual)
            return cache, begin(rows, row, scores[0], count, limit, seen(tokens, count), wishes)

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def further(weights, cache, rows, row, tokens, start, count, visual, first, limit, wishes):
            scores, cache = decoder.extend(weights, cache, row, tokens, start, count, visual, first)
            known = rows.seen[row] | seen(tokens, count)
            return cache, begin(rows, row, scores[0], start + count, limit, known, wishes)

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def run(weights, cache, rows, until_one, most):
            cache, rows, out = decode(decoder, weights, cache, rows, STEPS, until_one, most)
            return cache, rows, _packed(out, rows)

        @functools.partial(jax.jit, donate_argnums=0)
        def halt(rows, row):
            return rows._replace(running=rows.running.at[row].set(False))

        held = self._weights, *described((self._cache, self._rows))
        visual, number = described(self._visual), jax.ShapeDtypeStruct((), jnp.int32)
        flag = jax.ShapeDtypeStruct((), jnp.bool_)
        wishes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Wishes.of(Sampling())
        )

        def words(length: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((length,), jnp.int32)

        family = functools.partial(Family, self.programs)
        self._place = family(
            "visual tokens", place, lambda tokens: (visual, tokens, number, number)
        )
        self._fill = family(
            "prefill",
            fill,
            lambda length: (*held, number, words(length), number, visual, number, wishes),
        )
        self._further = family(
            "prefill of what follows",
            further,
            lambda length: (
                *held, number, words(length), number, number, visual, number, number, wishes,
            ),
        )  # fmt: skip
        self._run = family("decoding", run, lambda: (*held, flag, number))
        self._halt = family("stop", halt, lambda: (held[2], number))

    @property
    def free_slots(self) -> int:
        """Requests that can be admitted now."""
        return len(self._free)

    def encode(
        self, frames: np.ndarray | Iterable[np.ndarray], options: Options = AS_TRAINED
    ) -> Visual:
        """Visual tokens of one medium, see `Encoder`."""
        return self.encode_frames(frames, options)

    def wait(self) -> None:
        """Waits until every prompt is in the cache; only measurements need it."""
        jax.block_until_ready(self._rows.token)

    def can_encode(self, frames: int, options: Options = AS_TRAINED) -> bool:
        """Whether `encode` of so many frames compiles nothing; else that begins beside."""
        return self.encode_frames.ahead(frames, options)

    def can_admit(self, tokens: int, media: Sequence[Visual] = ()) -> bool:
        """Whether `admit` compiles nothing; else that begins beside.

        Args:
          tokens: of the prompt. One that is too long is for `admit` to refuse.
        """
        if not 0 < tokens < self.context:
            return True
        there = [self._place.ahead(*described((m.tokens,))) for m in media]
        there += [self._fill.ahead(self._prompt_length(tokens))]
        return all([*there, self._run.ahead(), self._halt.ahead()])

    def can_extend(self, slot: int, tokens: int, media: Sequence[Visual] = ()) -> bool:
        """Whether `extend` compiles nothing; else that begins beside. See `can_admit`."""
        state = self._slots[slot]
        n = tokens + len(state.behind)
        if not 0 < state.length + n < self.context:
            return True
        there = [self._place.ahead(*described((m.tokens,))) for m in media]
        return all([*there, self.can_go_on(n), self._run.ahead(), self._halt.ahead()])

    def can_go_on(self, tokens: int) -> bool:
        """Whether `extend` by so many tokens without media compiles nothing; see `can_admit`."""
        return all([self._further.ahead(length) for length in dict.fromkeys(_pieces(tokens))])

    def prompt_lengths(self, least: int, most: int) -> list[int]:
        """To which prompts of `least` to `most` tokens are padded: a program each."""
        most = min(most, self.context - 1)
        return list(dict.fromkeys(self._prompt_length(n) for n in range(least, most + 1)))

    def admit(self, tokens: np.ndarray, media: Sequence[Visual], sampling: Sampling) -> int:
        """Starts an answer.

        Args:
          tokens: int32 [n] of `data.text.encode_prompt`, VISUAL where a visual token stands.
          media: of the prompt in order; their counts add to the number of VISUAL.

        Returns:
          The slot, for `step`, `extend` and `release`.

        Raises:
          ContextError: the prompt is too long.
          CompileError: there is no program for it; nothing has changed.
          RuntimeError: no slot is free.
          ValueError: tokens and media do not fit each other.
        """
        n = self._check(tokens, media, 0)
        if not self._free:
            raise RuntimeError(f"all {len(self._slots)} slots are taken")
        length = self._prompt_length(n)
        fill = self._fill(length)
        self._show(media)
        slot = self._free.pop()
        self._slots[slot] = _Slot()
        limit = min(sampling.max_new_tokens, self.context - n)
        with jax.set_mesh(self.loaded.mesh):
            self._cache, self._rows = fill(
                self._weights, self._cache, self._rows, np.int32(slot),
                _padded(tokens, length), np.int32(n), self._visual, np.int32(limit),
                Wishes.of(sampling),
            )  # fmt: skip
        self._start(slot, n)
        return slot

    def extend(
        self, slot: int, tokens: np.ndarray, media: Sequence[Visual], sampling: Sampling
    ) -> None:
        """Goes on with further tokens behind an answer, for a conversation of several turns.

        The cache keeps the prompt and every token that `step` returned. An answer that is still
        being made ends where it stands.

        Args:
          tokens: what follows the answer: the end of its turn, the next question, the header of the
            next answer. The rest is as in `admit`.
        """
        state = self._slots[slot]
        with jax.set_mesh(self.loaded.mesh):
            if state.running:
                self._stop(slot)
                state.running = False
            tokens = np.concatenate([np.asarray(state.behind, np.int32), tokens])
            n = self._check(tokens, media, state.length)
            programs = [self._further(length) for length in _pieces(n)]
            self._show(media)
            limit, used = min(sampling.max_new_tokens, self.context - state.length - n), 0
            for further, length, at in zip(programs, _pieces(n), range(0, n, _PIECE), strict=True):
                piece = tokens[at : at + _PIECE]
                self._cache, self._rows = further(
                    self._weights, self._cache, self._rows, np.int32(slot),
                    _padded(piece, length), np.int32(state.length + at), np.int32(len(piece)),
                    self._visual, np.int32(used), np.int32(limit), Wishes.of(sampling),
                )  # fmt: skip
                used += int((piece == VISUAL).sum())
        self._start(slot, state.length + n)

    def step(self, hurry: bool | None = None, most: int | None = None) -> list[Progress]:
        """Adds tokens to the answers that are being made; an entry for each that grew or ended.

        Answers whose first token was chosen since the last call give that one alone, at once. Else
        all grow by up to `most` tokens.

        Args:
          hurry: by fewer as soon as one ends, since somebody waits for its slot; None: if no slot
            is free.
          most: 1 to `STEPS`; None: as many as take 60 ms, by the pace of the calls before, but at
            least 8.
        """
        active = {slot: state for slot, state in self._slots.items() if state.running}
        if not active:
            return []
        if fresh := {slot: state for slot, state in active.items() if state.first}:
            rows = self._rows
            token, *about = jax.device_get((rows.token, rows.running, rows.stopped, rows.finite))
            progress = []
            for slot, state in fresh.items():
                state.first = False
                tokens = [] if about[1][slot] else [int(token[slot])]
                progress.append(self._progress(slot, state, tokens, *about))
            return progress
        if hurry is None:
            hurry = not self._free
        if most is None:
            most = min(max(int(_CALL / self._pace), _FEW), STEPS)
        run, began = self._run(), time.perf_counter()
        with jax.set_mesh(self.loaded.mesh):
            self._cache, self._rows, news = run(
                self._weights, self._cache, self._rows, np.bool_(hurry), np.int32(most)
            )
        out, position, *about = _unpacked(np.asarray(news))
        if most >= _FEW and (out[:, most - 1] >= 0).any():
            self._pace = (time.perf_counter() - began) / most
        progress = []
        for slot, state in active.items():
            tokens = [int(t) for t in out[slot] if t >= 0]
            state.length = int(position[slot])
            progress.append(self._progress(slot, state, tokens, *about))
        return progress

    def _progress(
        self, slot: int, state: _Slot, tokens: list[int], running_B, stopped_B, finite_B
    ) -> Progress:
        state.running, stopped = bool(running_B[slot]), stopped_B[slot]
        if tokens:
            state.behind = tokens[-1:]
        if stopped:  # what came before the stop token was computed to find it
            state.behind = []
        finish = "" if state.running else "stop" if stopped else "length"
        return Progress(slot, tokens, finish, bool(finite_B[slot]))

    def release(self, slot: int) -> None:
        """Frees a slot, also in the middle of an answer."""
        state = self._slots.pop(slot)
        if state.running:
            self._stop(slot)
        self._free.append(slot)
        self._free.sort(reverse=True)

    def _stop(self, slot: int) -> None:
        self._rows = self._halt()(self._rows, np.int32(slot))

    def _prompt_length(self, tokens: int) -> int:
        """To which a prompt is padded."""
        return min(max(bucket(tokens, 8), _SHORTEST), self.context)

    def _show(self, media: Sequence[Visual]) -> None:
        """Puts the visual tokens of media, one behind the other, where prefill reads them."""
        at = 0
        for visual in media:
            place = self._place(*described((visual.tokens,)))
            self._visual = place(self._visual, visual.tokens, np.int32(at), np.int32(visual.count))
            at += visual.count

    def _start(self, slot: int, length: int) -> None:
        self._slots[slot] = _Slot(length=length, first=True, running=True)

    def _check(self, tokens: np.ndarray, media: Sequence[Visual], held: int) -> int:
        n, visual = len(tokens), int((tokens == VISUAL).sum())
        counted = sum(m.count for m in media)
        if visual != counted:
            raise ValueError(f"{visual} VISUAL tokens, but the media have {counted}")
        if not n:
            raise ValueError("an empty prompt")
        if held + n + 1 > self.context:
            raise ContextError(held + n + 1, self.context)
        return n


def _packed(out_BS: jax.Array, rows: Rows) -> jax.Array:
    """What `step` wants to know, in one array: every copy to the host costs time of its own."""
    flags = rows.running + 2 * rows.stopped + 4 * rows.finite
    return jnp.concatenate([out_BS, rows.position[:, None], flags[:, None]], axis=1)


def _unpacked(news: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tokens, position, running, stopped, finite."""
    flags = news[:, -1]
    return news[:, :-2], news[:, -2], *((flags & bit) != 0 for bit in (1, 2, 4))


def _padded(tokens: np.ndarray, length: int) -> np.ndarray:
    return np.pad(tokens.astype(np.int32), (0, length - len(tokens)))


def _pieces(tokens: int) -> list[int]:
    """The lengths that the pieces of what follows are padded to."""
    lengths = [min(_PIECE, tokens - at) for at in range(0, tokens, _PIECE)]
    return [min(max(bucket(n, 2), _SHORTEST), _PIECE) for n in lengths]


def further_lengths() -> list[int]:
    """To which pieces of `extend` are padded: a program each."""
    return list(dict.fromkeys(_pieces(n)[0] for n in range(1, _PIECE + 1)))
