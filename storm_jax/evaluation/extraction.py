"""Answers in the outputs of models: one rule for each family of prompts.

Both rules return the index of an option, or None where there is no answer: nothing is guessed, and
no item is left out. They first look at the output as a whole (`_whole`): one that is the text of an
option, with or without its letter, means that option; so outputs of models that were trained to
give texts count. Yes and no are read as TempCompass does: the output begins with the word. What
follows differs:

`official`, for the families official and vila (VILA asks Video-MME by the official prompt): the
rule of Video-MME, and of LongVideoBench but for its random choice. Phrases as "The best answer is"
are taken out; then the first letter of an option is the answer, wherever it stands. As published it
takes capitals of words as well: "Based on ..." is B. The code of MVBench, MLVU, LVBench and
TempCompass looks at the beginning only; on an output that begins with its letter it is the same.

`lmms`: the shared rule of lmms-eval 0.7 (Video-MME, MLVU, LVBench). Of all places where a letter
stands, the best kind counts, and within a kind the last: the start of the output, its end, after a
phrase as "the answer is", (A), A., A:, A), A and a space, any capital. lmms-eval has rules of their
own for MVBench, LongVideoBench, EgoSchema and TempCompass. They agree with this one on a letter, as
A, A., (A), and on these with the option's text behind them; not on outputs that they misread, as
"A)" for EgoSchema (a random letter) and "Answer: C" for LongVideoBench (A).

The letters are those that the item has: six for MLVU's test set, where lmms-eval knows only A to D.
"""

import re
from collections.abc import Sequence

from storm_jax.evaluation.items import Family, Item

# Video-MME's, in its order; each is taken out wherever it stands.
_PHRASES_OFFICIAL = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)

_PHRASES_LMMS = (
    *(f"{the}{kind}answer is" for the in ("the ", "") for kind in ("", "correct ", "best ")),
    *(f"{the}{kind}option is" for the in ("the ", "") for kind in ("correct ", "best ")),
    *(f"{the}{kind}choice is" for the in ("the ", "") for kind in ("", "correct ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def extract(text: str, item: Item, family: Family) -> int | str | None:
    """The answer in an output, by the family's rule (see the module).

    Returns:
      Index into `item.options`, or None. For an open-ended question the output itself without white
      space around it, or None where nothing is left.
    """
    text = text.strip()
    if not text:
        return None
    if not item.options:
        return text
    whole = _whole(text, item)
    if whole is not None:
        return whole
    if _asks_yes_or_no(item):
        return None
    letters = item.letters
    letter = _lmms(text, letters) if family == "lmms" else _official(text, letters)
    return None if letter is None else letters.index(letter)


def _asks_yes_or_no(item: Item) -> bool:
    return item.labels == ("yes", "no")  # without letters


def _whole(text: str, item: Item) -> int | None:
    """The option whose text the whole output is."""
    bare = _plain(text)
    if _asks_yes_or_no(item):
        for index, word in enumerate(("yes", "no")):
            if bare.startswith(word):
                return index
        return None
    if bare in {_plain(letter) for letter in item.letters}:
        return None  # a letter, even where some option's text is one
    # Of options with the same text the last, as in the code of MVBench and MLVU.
    for index in range(len(item.options) - 1, -1, -1):
        option, letter = _plain(item.options[index]), _plain(item.letters[index])
        forms = (option, *(f"{letter}{mark} {option}" for mark in (".", ":", ")")))
        if option and bare.removeprefix("(") in forms:
            return index
    return None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def _official(text: str, letters: Sequence[str]) -> str | None:
    for phrase in _PHRASES_OFFICIAL:
        text = text.replace(phrase, "")
    # Its test of ten words changes nothing where no letter is an answer in any case.
    found = re.search("|".join(map(re.escape, letters)), text)
    return found and found.group()


def _lmms(text: str, letters: Sequence[str]) -> str | None:
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    padded, text = f" {text} ", text.strip()
    # A letter at an end stands alone if what is beside it is no letter.
    for letter in letters:
        if text.startswith(letter) and not text[len(letter) :][:1].isalpha():
            return letter
    for letter in letters:
        if text.endswith(letter) and not text[: -len(letter)][-1:].isalpha():
            return letter
    after = _behind_phrases(padded, letters)
    kinds = [{letter: after[letter] for letter in letters}]
    for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}"):
        kinds.append({letter: padded.rfind(form.format(letter)) for letter in letters})
    for places in kinds:
        best = max(letters, key=lambda letter: places[letter])
        if places[best] >= 0:
            return best
    return None


def _behind_phrases(text: str, letters: Sequence[str]) -> dict[str, int]:
    """Of each letter, the last of the places where it first stands behind a phrase; or -1."""
    lower = text.lower()
    found = dict.fromkeys(letters, -1)
    for phrase in _PHRASES_LMMS:
        at = lower.find(phrase)
        if at >= 0:
            for letter in letters:
                found[letter] = max(found[letter], text.find(letter, at + len(phrase)))
    return found
