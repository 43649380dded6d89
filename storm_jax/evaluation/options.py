"""Options of multiple-choice questions: read, checked, and printed."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from storm_jax.evaluation.items import Item, TaskError

_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s*")

Style = Literal["(A) x", "A. x"]


def checked(
    where: str, options: Any, least: int = 2, most: int = 26, duplicates: bool = False
) -> tuple[str, ...]:
    """A list of options as texts.

    Args:
      where: file and item, for messages.
      least, most: how many the benchmark has.
      duplicates: whether its published files hold items with equal options.

    Raises:
      TaskError: they are no list, too few or too many, empty, or twice the same.
    """
    if not isinstance(options, (list, tuple)) or not options:
        raise TaskError(f"{where} has no options ({options!r}); add them, or leave the item out")
    texts = []
    for option in options:
        if isinstance(option, (int, float)) and not isinstance(option, bool):
            option = str(option)
        if not isinstance(option, str):
            raise TaskError(f"{where} has the option {option!r}; options are texts")
        texts.append(option)
    if not least <= len(texts) <= most:
        allowed = f"{least}" if least == most else f"{least} to {most}"
        raise TaskError(
            f"{where} has {len(texts)} option{'s' * (len(texts) != 1)} ({texts}), expected"
            f" {allowed}; is the file complete, and of this benchmark?"
        )
    if not duplicates:
        blank = any(not t.strip() for t in texts)
        same = {t for t in texts if texts.count(t) > 1}
        if blank or same:
            fault = f"{sorted(same)[0]!r} twice" if same else "an empty option"
            raise TaskError(
                f"{where} has {fault} among its options {texts}: no answer could be told from the"
                " other; correct the item, or leave it out"
            )
    return tuple(texts)


def decided(where: str, texts: Sequence[str], right: int) -> int:
    """`right`, the index of the right option, if no other option has its text.

    For published files whose wrong options may well be twice the same.

    Raises:
      TaskError: another option has the same text.
    """
    if list(texts).count(texts[right]) > 1:
        raise TaskError(
            f"{where} has its right answer {texts[right]!r} twice among its options {list(texts)}:"
            " no answer could be told from the other; correct the item, or leave it out"
        )
    return right


def unlettered(where: str, options: Sequence[str]) -> tuple[str, ...]:
    """Texts of options that are printed with their letters, "A. x".

    Raises:
      TaskError: the letters are not A, B, C, ... in order.
    """
    texts = []
    for number, option in enumerate(options):
        match = _LETTERED.match(option)
        if match is None or match[1] != chr(ord("A") + number):
            raise TaskError(
                f"{where} has the option {option!r} where {chr(ord('A') + number)!r} and its text"
                f" were expected, as in '{chr(ord('A') + number)}. text'"
            )
        texts.append(option[match.end() :])
    return tuple(texts)


def split_question(where: str, printed: str) -> tuple[str, tuple[str, ...]]:
    """Question and options of a text that ends with lines "(A) x", "(B) y" or "A. x", "B. y".

    Raises:
      TaskError: no such lines, or other letters than A, B, C, ...
    """
    lines = printed.strip().split("\n")
    starts = []  # lines at which an option begins; text of several lines belongs to it
    for number, line in enumerate(lines):
        match = _LETTERED.match(line)
        if match and number and match[1] == chr(ord("A") + len(starts)):
            starts.append(number)
    if not starts:
        raise TaskError(
            f"{where} has no options in its question {printed!r}: expected lines '(A) ...',"
            " '(B) ...'"
        )
    ends = [*starts[1:], len(lines)]
    options = ["\n".join(lines[a:b]) for a, b in zip(starts, ends, strict=True)]
    return "\n".join(lines[: starts[0]]), unlettered(where, options)


def answer_index(
    where: str, answer: Any, options: Sequence[str], kind: Literal["letter", "text", "index"]
) -> int:
    """The index of the right option; of equal texts the last, as in MVBench's and MLVU's code.

    Raises:
      TaskError: it is none of the options.
    """
    found = None
    if kind == "letter" and isinstance(answer, str):
        letter = answer.strip().strip("().").upper()
        if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(options):
            found = ord(letter) - ord("A")
    elif kind == "index" and isinstance(answer, int) and not isinstance(answer, bool):
        found = answer if 0 <= answer < len(options) else None
    elif kind == "text" and isinstance(answer, (str, int, float)):
        found = max((i for i, o in enumerate(options) if o == str(answer)), default=None)
    if found is None:
        raise TaskError(
            f"{where} has the answer {answer!r}, which is no {kind} of its {len(options)} options"
            f" {list(options)}"
        )
    return found


def lines(item: Item, style: Style) -> str:
    """The item's options, a line each."""
    form = "({}) {}" if style == "(A) x" else "{}. {}"
    pairs = zip(item.letters, item.options, strict=True)
    return "\n".join(form.format(letter, option) for letter, option in pairs)


def unique(where: str, items: Iterable[Item]) -> list[Item]:
    """The items, in order.

    Raises:
      TaskError: two have one id.
    """
    seen: dict[str, Item] = {}
    for item in items:
        if item.id in seen:
            raise TaskError(f"{where}: two items have the id {item.id!r}; is a file there twice?")
        seen[item.id] = item
    return list(seen.values())
