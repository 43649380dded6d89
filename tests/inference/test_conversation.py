"""How media, subtitles and questions are laid out, and conversations against the engine's parts."""

import dataclasses

import jax
import numpy as np
import pytest

from storm_jax.config import MeshConfig
from storm_jax.data import text
from storm_jax.data.conversation import Media, Turn
from storm_jax.inference.conversation import Conversation, Medium, PlacementError, opening
from storm_jax.inference.engine import Engine
from storm_jax.inference.load import made_ready
from storm_jax.inference.sampling import Sampling
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from tests.inference.test_engine import perturbed
from tests.tiny import run_config, tiny_model

A, B = Medium(Media("video", "a.mp4")), Medium(Media("video", "b.mp4"))
PHOTO = Medium(Media("image", "p.png"))
TITLED = Medium(Media("video", "t.mp4"), ("one", "two"))


def test_media_stand_before_the_question():
    assert opening("What?", [A]) == ("<video>\nWhat?", [A])
    assert opening("What?", [A, B, PHOTO]) == ("<video>\n<video>\n<image>\nWhat?", [A, B, PHOTO])


def test_media_stand_where_the_question_names_them():
    prompt = "Is <image> in <video> or in <video>?"
    assert opening(prompt, [A, B, PHOTO]) == (prompt, [PHOTO, A, B])


def test_subtitles_stand_behind_the_media():
    prompt, _ = opening("What?", [TITLED])
    assert prompt == "<video>\nThis video's subtitles are listed below:\none\ntwo\nWhat?"
    prompt, _ = opening("First <image>, then <video>: what?", [TITLED, PHOTO])
    assert prompt == (
        "First <image>, then <video>\nSubtitles of medium 2 are listed below:\none\ntwo\n: what?"
    )


def test_placeholders_without_their_medium():
    for prompt, media in (("<image>?", [A]), ("<video>?", [A, B]), ("<video> <video>", [A])):
        with pytest.raises(PlacementError, match="name each once, or none"):
            opening(prompt, media)


@pytest.fixture(scope="module")
def engine():
    config = tiny_model(decoder=dict(vocab_size=text.BYTES_VOCAB))
    run = run_config(**{"data.tokenizer": "bytes"})
    run = dataclasses.replace(run, model=config)
    params = perturbed(StormModel(config).init(jax.random.key(0)))
    mesh = make_mesh(MeshConfig(data=1, tensor=1), jax.devices()[:1])
    return Engine(made_ready(run, params, mesh), slots=1, context=256)


@pytest.fixture(scope="module")
def visual(engine):
    frames = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    return engine.encode(frames)


def generated(engine, tokens, media, sampling):
    """Token ids, from the engine's own methods."""
    slot = engine.admit(tokens, media, sampling)
    made, finish = [], ""
    while not finish:
        (progress,) = engine.step()
        made, finish = made + progress.tokens, progress.finish
    engine.release(slot)
    return made


def test_a_chat_is_one_conversation(engine, visual):
    """The second answer is that of the whole conversation from its beginning."""
    tokenizer = text.load_tokenizer("bytes")
    sampling = Sampling(max_new_tokens=12)
    chat = Conversation(engine, tokenizer, sampling)
    prompt, _ = opening("What?", [A])
    chat.ask(prompt, [visual])
    first = "".join(chat.answer())
    assert chat.finish == "length" and chat.answer_tokens == 12
    with pytest.raises(PlacementError, match="<video> in a further question"):
        chat.ask("And <video>?")
    chat.ask("Why?")
    second = "".join(chat.answer())
    chat.close()
    assert engine.free_slots == 1

    tokens = text.encode_prompt(tokenizer, "gemma", [Turn("user", prompt)], [visual.count])
    made = generated(engine, tokens, [visual], sampling)
    assert tokenizer.decode(made, skip_special_tokens=True) == first
    whole = [*tokens, *made, *text.encode_next(tokenizer, "gemma", "Why?")]
    more = generated(engine, np.array(whole, np.int32), [visual], sampling)
    assert tokenizer.decode(more, skip_special_tokens=True) == second


def test_stop_strings_end_an_answer(engine, visual):
    tokenizer = text.load_tokenizer("bytes")
    sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=3)
    prompt, _ = opening("What?", [A])

    def answer(stops):
        chat = Conversation(engine, tokenizer, sampling, stops)
        chat.ask(prompt, [visual])
        found = "".join(chat.answer())
        chat.close()
        return found, chat.finish

    whole, finish = answer(())
    assert finish == "length" and len(whole) > 8
    stop = whole[5:7]
    assert answer((stop, "\x00nowhere")) == (whole[: whole.index(stop)], "stop")
