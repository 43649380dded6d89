"""Outputs that say that something is wrong with the model or the recipe, not with its knowledge."""

from collections.abc import Sequence

_LEAST = 24  # characters of repetition: "1, 1, 1" and "ha ha ha" are answers
_LEAST_TIMES = 3.5  # the last one may be cut off


def faults(output: str, finite: bool, finish: str) -> list[str]:
    """What is degenerate about an output.

    Args:
      finite: whether all scores of the answer were.
      finish: "error" where there is no output because a medium could not be read.

    Returns:
      Of "non-finite" (a score was NaN or infinite: a broken checkpoint, or an overflow of the
      dtype), "empty", "repetition" (it ends with the same piece of text again and again, "!!!!!!").
    """
    if finish == "error":
        return []
    found = [] if finite else ["non-finite"]
    if not output.strip():
        found.append("empty")
    elif repeats(output.strip()):
        found.append("repetition")
    return found


def repeats(text: Sequence) -> bool:
    """Whether a text ends with three and a half times the same piece or more, 24 characters in all.

    The last piece may be cut off, as where the longest allowed answer ends.
    """
    n = len(text)
    # The tail has period p if it equals itself p places further on.
    for period in range(1, int(n / _LEAST_TIMES) + 1):
        same = 0
        while same < n - period and text[n - 1 - same] == text[n - 1 - same - period]:
            same += 1
        if same + period >= max(_LEAST, _LEAST_TIMES * period):
            return True
    return False
