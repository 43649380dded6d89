"""Answers on several engines against a loop that knows no batching, and what is encoded when."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from storm_jax.data import text
from storm_jax.data.conversation import Media, Turn
from storm_jax.data.video import sample
from storm_jax.evaluation import plan
from storm_jax.evaluation.answering import Answering, Request
from storm_jax.evaluation.items import Item
from storm_jax.evaluation.plan import Asking
from storm_jax.evaluation.tasks import all_tasks
from storm_jax.inference.engine import ContextError, Engine
from storm_jax.inference.load import load, replicas
from storm_jax.inference.media import Decoders
from storm_jax.inference.options import Options
from storm_jax.inference.sampling import Sampling
from tests.evaluation.benchmark_files import longvideobench_official
from tests.evaluation.small_run import write_checkpoint, write_questions

CONTEXT = 256


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("run") / "run")
    return load(folder, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer("bytes")


@pytest.fixture(scope="module")
def decoders():
    with Decoders(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder)
    return all_tasks()["own"].load(folder)


def asking(loaded, tokenizer, options=None, subtitles=False):
    options = options or Options()
    return Asking(options.apply(loaded.config), options, tokenizer, Sampling(), (), 0, subtitles)


def answered(engine, tokenizer, tokens, visual, most):
    """What the model says to one prompt, alone in the engine."""
    slot = engine.admit(tokens, visual, Sampling(max_new_tokens=most))
    ids, finish = [], ""
    while not finish:
        (progress,) = engine.step()
        ids, finish = ids + progress.tokens, progress.finish
    engine.release(slot)
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_answers_of_two_engines_are_those_of_a_loop(loaded, tokenizer, decoders, items):
    task, how = all_tasks()["own"], asking(loaded, tokenizer)
    planned = plan.plan(task, items, "official", how, decoders)
    media = [p.request.media for p in planned]
    assert len(set(media)) == 8 and len(media) == 12  # two segments of four videos
    assert len(list(itertools.groupby(media))) == 8  # each is asked about at one time
    models = [loaded, *replicas(loaded, [[jax.devices()[1]]])]
    engines = [Engine(m, slots=2, context=CONTEXT) for m in models]
    encoded = []
    for engine in engines:
        inner = engine.encode_frames
        engine.encode_frames = lambda frames, options, inner=inner: (
            encoded.append(1) or inner(frames, options)
        )
    answering = Answering(engines, tokenizer, decoders, how.config, how.options)
    found = list(answering.run([p.request for p in planned]))
    assert len(encoded) == 8 == answering.work.media
    assert answering.work.frames == sum({o.request.media: o.frames for o in found}.values())
    outputs = {o.request.key: o for o in found}
    assert len(outputs) == len(found) == 12
    engine = Engine(loaded, slots=1, context=CONTEXT)
    said = set()
    for item in items:
        prompt = task.prompt(item, "official")
        frames, _ = sample(plan.medium(item), how.config.data.frames, 12)
        visual = engine.encode(frames)
        turns = (Turn("user", prompt.text),)
        tokens = text.encode_prompt(tokenizer, how.config.data.chat_template, turns, [visual.count])
        want = answered(engine, tokenizer, tokens, [visual], prompt.max_new_tokens)
        assert outputs[item.id].output == want, item.id
        assert outputs[item.id].finite and outputs[item.id].finish in ("stop", "length")
        said.add(want)
    assert len(said) > 2  # else the test would see nothing
    for planned_ in planned:
        assert outputs[planned_.item.id].prompt_tokens + 16 == planned_.needed
    assert all(e.free_slots == 2 for e in engines)


def test_frames_between_subtitles_take_their_own_tokens(loaded, tokenizer, decoders, tmp_path):
    longvideobench_official(tmp_path)
    task = all_tasks()["longvideobench_val"]
    items = [i for i in task.load(tmp_path) if i.subtitles]
    how = asking(loaded, tokenizer, subtitles=True)
    planned = plan.plan(task, items, "official", how, decoders)
    split = [p for p in planned if len(p.request.groups) > 1]
    assert split
    for one in split:
        ids = one.request.tokens(tokenizer, how.config, [0])
        runs = "".join("v" if t < 0 else " " for t in ids).split()
        sizes = [how.config.model.group_tokens * n for n in one.request.groups]
        assert list(map(len, runs)) == sizes
    engine = Engine(loaded, slots=2, context=1024)
    answering = Answering([engine], tokenizer, decoders, how.config, how.options)
    assert {o.finish for o in answering.run([p.request for p in planned])} <= {"stop", "length"}
    pruned = asking(loaded, tokenizer, Options(keep_tokens=0.5), subtitles=True)
    with pytest.raises(ValueError, match="leave out --duplicate_threshold and --keep_tokens"):
        plan.plan(task, items, "official", pruned, decoders)


def test_prefix_stop_and_two_media(loaded, tokenizer, decoders, items):
    config = loaded.config
    media = tuple(Media("video", items[i].video) for i in (0, 1))
    requests = [
        Request(i, media, (Turn("user", f"<video> or {i} <video>?"),), Sampling(max_new_tokens=12))
        for i in range(6)
    ]
    engine = Engine(loaded, slots=2, context=CONTEXT)
    answering = Answering([engine], tokenizer, decoders, config, Options())
    whole = min(answering.run(requests), key=lambda o: o.output.count("\ufffd"))
    assert whole.visual_tokens == 2 * config.model.visual_tokens(8) and whole.output_tokens == 12
    stop = next(c for c in whole.output[1:] if c not in (whole.output[0], "\ufffd"))
    (short,) = answering.run([dataclasses.replace(whole.request, stop=(stop,))])
    assert short.output == whole.output[: whole.output.index(stop)] and short.finish == "stop"
    assert 0 < short.output_tokens < whole.output_tokens
    (started,) = answering.run([dataclasses.replace(whole.request, answer_prefix="Best: (")])
    visual = [engine.encode(sample(m, config.data.frames, 12)[0]) for m in media]
    tokens = text.encode_prompt(
        tokenizer, config.data.chat_template, whole.request.turns, [v.count for v in visual]
    )
    tokens = np.concatenate([tokens, np.frombuffer(b"Best: (", np.uint8).astype(np.int32)])
    assert started.prompt_tokens == len(tokens)
    assert started.output == answered(engine, tokenizer, tokens, visual, 12)


def test_a_prompt_too_long_ends_all(loaded, tokenizer, decoders, items):
    media = (Media("video", items[0].video),)
    requests = [
        Request(i, media, (Turn("user", "<video>" + "x" * n),), Sampling(max_new_tokens=4))
        for i, n in enumerate((4, 4, 900, 4))
    ]
    engine = Engine(loaded, slots=1, context=CONTEXT)
    answering = Answering([engine], tokenizer, decoders, loaded.config, Options())
    with pytest.raises(ContextError):
        list(answering.run(requests))


def test_processes_take_whole_videos():
    items = [Item(str(i), f"{i % 5}.mp4", "?") for i in range(20)]
    shares = [plan.share(items, p, 3) for p in range(3)]
    assert sorted(i.id for s in shares for i in s) == sorted(i.id for i in items)
    videos = [{i.video for i in s} for s in shares]
    assert [len(v) for v in videos] == [2, 2, 1] and len(set.union(*videos)) == 5


def test_scores_that_are_no_numbers_show(loaded, tokenizer):
    broken = jax.tree.map(lambda x: x, loaded.weights)._replace(
        norm=loaded.weights.norm.at[0].set(np.nan)
    )
    engine = Engine(dataclasses.replace(loaded, weights=broken), slots=2, context=64)
    sound = Engine(loaded, slots=2, context=64)
    tokens = np.arange(10, dtype=np.int32)
    for each, finite in ((engine, False), (sound, True)):
        slot = each.admit(tokens, [], Sampling(max_new_tokens=12))
        while True:
            (progress,) = each.step()
            assert progress.finite is finite
            if progress.finish:
                break
        each.release(slot)
