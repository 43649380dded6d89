"""Text that grows is the text of all tokens, wherever it is cut."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storm_jax.data import text
from storm_jax.inference.text import AnswerText

TOKENIZER = text.load_tokenizer("bytes")


def pushed(ids, cuts, stops=()):
    answer = AnswerText(TOKENIZER, stops)
    pieces = []
    edges = [0, *sorted({c % (len(ids) + 1) for c in cuts}), len(ids)]
    for start, end in zip(edges, edges[1:], strict=False):
        pieces.append(answer.push(ids[start:end]))
    pieces.append(answer.close())
    return pieces, answer.stopped


CUTS = st.lists(st.integers(0, 400), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=150), CUTS)
# A character cut in two behind many others that came with its first half.
@example("0123456789é", [11])
@example("😀" * 40, list(range(1, 160)))
def test_valid_text(whole, cuts):
    pieces, _ = pushed(list(whole.encode()), cuts)
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in whole


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), CUTS)
def test_bytes_that_are_no_text(data, cuts):
    """Nothing is lost and nothing comes twice, whatever a model says."""
    pieces, _ = pushed(list(data), cuts)
    assert "".join(pieces).replace("\ufffd", "") == data.decode(errors="ignore")


@settings(max_examples=200, deadline=None)
@given(st.text("ab€", max_size=60), st.lists(st.text("ab€", min_size=1, max_size=4)), CUTS)
@example("baa", ["a", "baa"], [2])
def test_stop_strings(whole, stops, cuts):
    pieces, stopped = pushed(list(whole.encode()), cuts, stops)
    found = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    assert stopped == bool(found)
    assert "".join(pieces) == (whole[: min(found)[1]] if found else whole)


def test_text_comes_as_soon_as_it_is_final():
    answer = AnswerText(TOKENIZER, ["stop"])
    assert answer.push(list(b"a long text st")) == "a long text "
    assert answer.push(list(b"a")) == "sta"
    assert answer.push([0xE2, 0x82]) == ""
    assert answer.push([0xAC]) == "€"
    assert answer.push(list(b"stop and more")) == "" and answer.stopped
    assert answer.push([65]) == answer.close() == ""


@pytest.mark.parametrize("end", [b"\xe2\x82", b"\xff"])
def test_an_answer_that_ends_within_a_character(end):
    answer = AnswerText(TOKENIZER)
    assert answer.push([*b"text", *end]) == "text"
    assert answer.close() == "\ufffd"
