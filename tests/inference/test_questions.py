"""When which question is asked."""

import io
import math
import os
import time

from storm_jax.inference.questions import Questions


def asked(questions, times):
    got = []
    for t in times:
        while (text := questions.due(t)) is not None:
            got.append((t, text))
    return got


def test_each_at_its_time_and_in_order():
    questions = Questions([(5.0, "c"), (2.0, "a"), (2.0, "b"), (math.inf, "end")])
    assert asked(questions, [0, 1.9, 2.1, 4, 7, 9]) == [(2.1, "a"), (2.1, "b"), (7, "c")]
    assert questions.more
    assert questions.at_end() == "end" and questions.at_end() is None
    assert not questions.more


def test_again_and_again():
    questions = Questions([(10.0, "a"), (15.0, "b")], every=10.0)
    got = asked(questions, range(0, 46))
    assert got == [
        (10, "a"), (15, "b"), (20, "a"), (25, "b"), (30, "a"), (35, "b"), (40, "a"), (45, "b"),
    ]  # fmt: skip
    assert questions.more  # for ever


def test_a_jump_of_the_time_asks_once():
    questions = Questions([(0.0, "a")], every=5.0)
    assert asked(questions, [0, 3, 63, 64, 65]) == [(0, "a"), (63, "a"), (65, "a")]


def test_at_the_end_only_what_was_never_asked():
    questions = Questions([(1.0, "a"), (100.0, "b")], every=2.0)
    assert asked(questions, [0, 2]) == [(2, "a")]
    assert questions.at_end() == "b"
    assert questions.at_end() is None and not questions.more


def test_typed_lines():
    questions = Questions(typed=io.StringIO("first\n\n  second  \nthird"))
    deadline = time.monotonic() + 5
    got = []
    while questions.typing and time.monotonic() < deadline:
        line = questions.line()
        if line is not None:
            got.append(line)
    assert got == ["first", "second", "third"] and not questions.more


def test_more_may_come_while_the_pipe_is_open():
    reading, writing = os.pipe()
    with os.fdopen(reading) as pipe, os.fdopen(writing, "w") as writer:
        questions = Questions(typed=pipe)
        assert questions.line() is None and questions.more
        # More lines than are read ahead: the rest waits in the pipe.
        writer.write("".join(f"{i}\n" for i in range(100)))
        writer.flush()
        got = []
        while len(got) < 100:
            got += [x for x in [questions.line()] if x is not None]
        assert got == [str(i) for i in range(100)] and questions.more
        writer.close()
        while questions.more:
            time.sleep(0.001)
