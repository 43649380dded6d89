"""A conversation about some media: how its first turn is laid out, and its answers one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storm_jax.data import text
from storm_jax.data.conversation import Media, Turn
from storm_jax.inference.engine import Engine
from storm_jax.inference.prefill import Visual
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.text import AnswerText


class PlacementError(ValueError):
    """Placeholders that are not those of the media; the message says which there are."""


@dataclass(frozen=True)
class Medium:
    """A medium, and the subtitles that are shown in its clip."""

    media: Media
    lines: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """What stands for it in a prompt."""
        return f"<{self.media.kind}>"


def opening(prompt: str, media: Sequence[Medium]) -> tuple[str, list[Medium]]:
    """The first turn of the user, and the media in the order in which it names them.

    Without placeholders in the prompt all media stand before it, each on a line. Subtitles stand
    between the last placeholder and what follows.

    Raises:
      PlacementError: the prompt has placeholders, but not one for each medium.
    """
    named, marks = text.PLACEHOLDER.findall(prompt), [m.mark for m in media]
    if not named:
        prompt, named = "\n".join([*marks, prompt]), marks
    if sorted(named) != sorted(marks):
        raise PlacementError(
            f"the prompt has {' '.join(named)}, but there are {' '.join(marks) or 'no media'}:"
            " name each once, or none"
        )
    waiting = {mark: iter([m for m in media if m.mark == mark]) for mark in set(marks)}
    ordered = [next(waiting[mark]) for mark in named]
    blocks = []
    for number, medium in enumerate(ordered, 1):
        if medium.lines:
            whose = "This video's subtitles" if len(media) == 1 else f"Subtitles of medium {number}"
            blocks += [f"{whose} are listed below:", *medium.lines]
    if blocks:
        at = max(match.end() for match in text.PLACEHOLDER.finditer(prompt))
        prompt = "\n".join([prompt[:at], *blocks, prompt[at:].lstrip("\n")])
    return prompt, ordered


class Conversation:
    """Questions and answers in one slot of an engine.

    Attributes:
      prompt_tokens: that the last question added, visual tokens included.
      answer_tokens: of the last answer so far.
      finish: "stop": at the end of the turn or before a stop string; "length": no more tokens were
        allowed, or fit; "": the answer goes on.
    """

    def __init__(
        self, engine: Engine, tokenizer, sampling: Sampling, stop_strings: Sequence[str] = ()
    ):
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._stop_strings = stop_strings
        self._template = engine.loaded.config.data.chat_template
        self._slot: int | None = None
        self.prompt_tokens = self.answer_tokens = 0
        self.finish = ""

    def ask(self, prompt: str, visual: Sequence[Visual] = ()) -> None:
        """Prefills a question.

        Args:
          visual: media of the first question, in the order of its placeholders; they stay in the
            cache, and further questions have none.

        Raises:
          ContextError: there is no room for it.
          PlacementError: a further question has a placeholder.
        """
        if self._slot is None:
            turns, counts = (Turn("user", prompt),), [v.count for v in visual]
            tokens = text.encode_prompt(self._tokenizer, self._template, turns, counts)
            self._slot = self._engine.admit(tokens, visual, self._sampling)
        else:
            if found := text.PLACEHOLDER.search(prompt):
                raise PlacementError(
                    f"{found.group()} in a further question: media belong into the first one"
                )
            tokens = text.encode_next(self._tokenizer, self._template, prompt)
            self._engine.extend(self._slot, tokens, [], self._sampling)
        self._engine.wait()
        self.prompt_tokens = len(tokens)

    def answer(self) -> Iterator[str]:
        """The answer's text, piece by piece as it becomes final."""
        shown = AnswerText(self._tokenizer, self._stop_strings)
        self.answer_tokens, self.finish = 0, ""
        while not self.finish:
            (progress,) = self._engine.step()
            self.answer_tokens += len(progress.tokens)
            self.finish = progress.finish
            piece = shown.push(progress.tokens)
            if self.finish:
                piece += shown.close()
            if shown.stopped:
                self.finish = "stop"
            if piece:
                yield piece

    def close(self) -> None:
        """Frees the slot."""
        if self._slot is not None:
            self._engine.release(self._slot)
            self._slot = None
