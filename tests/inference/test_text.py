"""Text of answers as it becomes final."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storm_jax.data.text import load_tokenizer
from storm_jax.inference.text import AnswerText


@pytest.fixture(scope="module")
def tokenizer():
    """A token is a byte, so that every character beyond ASCII comes in pieces."""
    return load_tokenizer("bytes")


def fed(tokenizer, text: str, sizes, stops=()) -> tuple[list[str], AnswerText]:
    """The pieces that an answer gives when its ids come in runs of these sizes."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, pieces, at = AnswerText(tokenizer, stops), [], 0
    for size in sizes:
        pieces.append(answer.push(ids[at : at + size]))
        at += size
    pieces.append(answer.push(ids[at:]))
    return [*pieces, answer.close()], answer


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=200),
    st.lists(st.integers(0, 9), max_size=30),
)
@example("0123456789é", [11])  # its first half comes behind much that is whole
@example("😀" * 40, [1] * 160)
@settings(deadline=None, max_examples=60)
def test_nothing_is_lost_or_shown_by_halves(tokenizer, text, sizes):
    pieces, _ = fed(tokenizer, text, sizes)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_half_a_character_waits(tokenizer):
    pieces, _ = fed(tokenizer, "aé😀", [1, 1, 1, 1, 1, 1])
    assert pieces == ["a", "", "é", "", "", "", "😀", ""]


@given(st.text("abc", max_size=60), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 4), max_size=40))  # fmt: skip
@example("baa", ["a", "baa"], [2])
@settings(deadline=None, max_examples=100)
def test_stop_strings(tokenizer, text, stops, sizes):
    """The answer ends before the first stop string, wherever the pieces are cut."""
    pieces, answer = fed(tokenizer, text, sizes, stops)
    # Of stop strings that overlap, the one that is whole first counts.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text)
    assert answer.stopped == bool(ends)


def test_what_may_become_a_stop_string_waits(tokenizer):
    pieces, answer = fed(tokenizer, "go\nUsed", [1] * 6, ["\nUser:"])
    assert pieces == ["g", "o", "", "", "", "", "\nUsed", ""] and not answer.stopped
    pieces, answer = fed(tokenizer, "go\nUser: more", [1] * 12, ["\nUser:"])
    assert "".join(pieces) == "go" and answer.stopped
    assert answer.push([65]) == "" and answer.close() == ""


def test_long_answers_in_linear_time(tokenizer):
    """Only the newest ids are decoded again."""
    text = "The cat sat on the mat, again. " * 200
    pieces, answer = fed(tokenizer, text, [3] * 3000)
    assert "".join(pieces) == text
    assert len(answer._ids) < 100


@given(st.binary(max_size=300), st.lists(st.integers(0, 40), max_size=30))
@settings(deadline=None, max_examples=100)
def test_bytes_that_are_no_text(tokenizer, data, sizes):
    """Whatever a model says: nothing is lost, and nothing comes twice."""
    answer, pieces, at = AnswerText(tokenizer), [], 0
    for size in [*sizes, len(data)]:
        pieces.append(answer.push(list(data[at : at + size])))
        at += size
    whole = "".join([*pieces, answer.close()])
    assert whole.replace("\ufffd", "") == data.decode(errors="ignore")


@pytest.mark.parametrize("end", [b"\xe2\x82", b"\xff"])
def test_an_answer_that_ends_within_a_character(tokenizer, end):
    answer = AnswerText(tokenizer)
    assert answer.push([*b"text", *end]) == "text"
    assert answer.close() == "\ufffd"
