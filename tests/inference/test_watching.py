"""Frames, questions and answers on one thread."""

import time

import numpy as np

from storm_jax.data import text
from storm_jax.data.container import MediaError
from storm_jax.data.live import Feed, TimedFrame
from storm_jax.inference.questions import Questions
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.streaming import Stream
from storm_jax.inference.watching import Answered, Asked, Asker, Piece, Refused, TooLong, Watch
from tests.inference.tiny_streams import loaded, video

ROOM = 160  # of a question: its template has 60 bytes


class Watched:
    """A stream that is watched to its end; `events` with the frames that were in then."""

    def __init__(self, frames, questions, *, drop=False, new_tokens=6, stop=(), prepare=None):
        model = loaded(temporal_pool=2)
        self.stream = Stream(model, budget=6 * 4, batch=2)
        self.events = []
        tokenizer = text.load_tokenizer("bytes")
        self.asker = asker = Asker(
            model,
            self.stream,
            tokenizer,
            Sampling(max_new_tokens=new_tokens),
            stop_strings=stop,
            question_tokens=ROOM,
            tell=lambda event: self.events.append((self.stream.frames, event)),
        )
        if drop:
            self.stream.warm_up()
            asker.warm_up()
        self.feed = Feed(frames, depth=8, drop=drop)
        self.watch = Watch(self.feed, self.stream, asker, questions)
        if prepare is not None:
            prepare(self)
        self.watch.run()

    def of(self, kind):
        return [event for _, event in self.events if isinstance(event, kind)]


def at_seconds(count, pause=0.0):
    for second, image in enumerate(video(count)):
        time.sleep(pause)
        yield TimedFrame(float(second), image)


def test_a_file_is_asked_at_exact_times():
    watched = Watched(at_seconds(20), Questions([(3.0, "a"), (3.0, "b"), (12.5, "c"), (99, "d")]))
    answered = watched.of(Answered)
    assert [(a.question, a.frames, a.visual_tokens) for a in answered] == [
        ("a", 3, 8), ("b", 3, 8), ("c", 13, 24), ("d", 20, 24),
    ]  # fmt: skip
    assert [a.time for a in answered] == [2, 2, 12, 19]
    # The file waited: no frame came in while an answer was made.
    begun = [n for n, event in watched.events if isinstance(event, Asked)]
    done = [n for n, event in watched.events if isinstance(event, Answered)]
    assert begun == done == [3, 3, 13, 20]
    assert watched.feed.dropped == 0 and watched.stream.frames == 20
    pieces = "".join(p.text for p in watched.of(Piece))
    assert pieces == "".join(a.answer for a in answered) and all(a.tokens == 6 for a in answered)


def test_a_camera_goes_on_while_it_is_asked():
    questions = Questions([(2.0, "a")], every=2.0)
    watched = Watched(at_seconds(60, pause=0.01), questions, drop=True, new_tokens=64)
    begun = [n for n, event in watched.events if isinstance(event, Asked)]
    done = [n for n, event in watched.events if isinstance(event, Answered)]
    assert len(begun) == len(done) >= 2
    assert any(later > earlier for earlier, later in zip(begun, done, strict=True))
    assert watched.stream.frames + watched.feed.dropped == 60
    # The answer is about the frames that were there when it began.
    assert [a.frames for a in watched.of(Answered)] == begun


def test_a_camera_goes_on_while_a_program_is_compiled():
    """The program of the question's length is ready only when further frames have been taken in."""
    taken = []

    def hold(watched):
        programs = watched.asker._engine.programs
        compile_, stream = programs._compile, watched.stream

        def held(job):
            before, deadline = stream.frames, time.monotonic() + 30
            while stream.frames < before + 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            taken.append(stream.frames - before)
            compile_(job)

        programs._compile = held

    questions = Questions([(2.0, "a")])
    watched = Watched(at_seconds(60, pause=0.02), questions, drop=True, prepare=hold)
    (answered,) = watched.of(Answered)
    (begun,) = [n for n, event in watched.events if isinstance(event, Asked)]
    assert answered.frames == begun and answered.tokens == 6
    assert taken and taken[0] >= 4


def test_questions_that_cannot_be_answered():
    long = "?" * 2 * ROOM
    questions = Questions([(1.0, "Who is in <video>?"), (1.0, long), (2.0, "And this?")])
    watched = Watched(at_seconds(4), questions)
    placeholder, too_long = watched.of(Refused)
    assert "cannot hold <video>" in placeholder.error
    assert isinstance(too_long, TooLong) and too_long.needed > too_long.available
    assert [a.question for a in watched.of(Answered)] == ["And this?"]


def test_before_the_first_frame():
    watched = Watched(at_seconds(2), Questions([(0.0, "Is anybody there?")]))
    (answered,) = watched.of(Answered)
    assert (answered.frames, answered.visual_tokens) == (0, 0) and answered.tokens == 6


def test_a_source_that_is_lost():
    def lost():
        yield from at_seconds(5)
        raise MediaError("camera", "gone")

    watched = Watched(lost(), Questions([(1.0, "a"), (50.0, "b")]))
    assert str(watched.watch.lost) == "camera: gone"
    assert [(a.question, a.frames) for a in watched.of(Answered)] == [("a", 1), ("b", 5)]
    assert np.isfinite(np.asarray(watched.stream.visual().tokens)).all()


def test_stop_strings():
    (whole,) = Watched(at_seconds(3), Questions([(9.0, "a")]), new_tokens=20).of(Answered)
    stop = [c for c in whole.answer if c.isascii() and c.isprintable()][1]
    at = whole.answer.index(stop)
    assert at > 0 and whole.finish == "length"
    (cut,) = Watched(at_seconds(3), Questions([(9.0, "a")]), new_tokens=20, stop=[stop]).of(
        Answered
    )
    assert cut.answer == whole.answer[:at] and cut.finish == "stop"
