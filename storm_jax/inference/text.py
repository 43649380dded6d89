"""Token ids of an answer as text, while it grows."""

from collections.abc import Sequence

# Characters of U+FFFD at the end that may become others. Half a character is three at most, but a
# tokenizer that falls back to bytes decodes a run of them as a whole or not at all.
_LONGEST_HALF = 32


class AnswerText:
    """The text of one answer.

    Text is given out when it can no longer change: half a character waits for its other half, and
    what may become a stop string waits until it is one or cannot be.

    Args:
      tokenizer: of transformers; special tokens are left out.
      stop_strings: the answer ends before the one that is complete first.
    """

    def __init__(self, tokenizer, stop_strings: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stops = [s for s in stop_strings if s]
        self._ids: list[int] = []  # from the start of the last piece of text on
        self._given = ""  # text of these ids that is in `_held` or was given out
        self._held = ""  # final, but may begin a stop string
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Takes further ids; returns text that has become final, which may be none."""
        if self.stopped:
            return ""
        self._ids += ids
        text = self._final()
        new, self._given = text[len(self._given) :], max(self._given, text, key=len)
        if len(self._ids) > 64 and new:
            # Tokens of a word's start decode differently alone, so some stay for what follows.
            self._ids = self._ids[-8:]
            self._given = self._final()
        return self._release(new)

    def close(self) -> str:
        """What was held back, when no id follows."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        new, self._given = text[len(self._given) :], text
        given = self._release(new)
        if self.stopped:
            return given
        rest, self._held = self._held, ""
        return given + rest

    def _final(self) -> str:
        """The text of the ids, without an end that may be part of a character."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        whole = text.rstrip("\ufffd")
        return whole if len(text) - len(whole) <= _LONGEST_HALF else text

    def _release(self, new: str) -> str:
        text = self._held + new
        # The first one to be complete, which does not depend on how the tokens came.
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stops if s in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
