"""Chat completions with the official client, of a real engine behind a real server."""

import asyncio
import dataclasses
import json
import pathlib

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

pytest.importorskip("openai")
import openai

from storm_jax.config import FrameConfig
from storm_jax.data import text
from storm_jax.data import video as reading
from storm_jax.data.conversation import Media, Turn
from storm_jax.inference.engine import Engine
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.text import AnswerText
from tests.serving.conftest import tiny_run
from tests.serving.harness import (
    CONTEXT,
    MODEL,
    SETTINGS,
    data_url,
    image,
    running,
    video,
    words,
)

SEEDED = {"temperature": 1.5, "seed": 1}
RUN = tiny_run()
GROUP = RUN.model.group_tokens


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(loaded, slots=4, context=CONTEXT)


@pytest.fixture
def direct(engine, tokenizer):
    """The engine alone: what it answers to turns with <video>, given the media's frames.

    Random choices with a seed: they show the slightest difference, where greedy ones of a random
    model do not.
    """

    def answer(turns, media, **fields):
        visuals = [engine.encode(frames) for frames in media]
        counts = [v.count for v in visuals]
        tokens = text.encode_prompt(tokenizer, RUN.data.chat_template, turns, counts)
        stop = text.stop_tokens(tokenizer, RUN.data.chat_template)
        slot = engine.admit(tokens, visuals, Sampling(stop_tokens=stop, **SEEDED | fields))
        said = AnswerText(tokenizer)
        whole, finish, count = "", "", 0
        while not finish:
            (progress,) = engine.step()
            whole += said.push(progress.tokens)
            count += len(progress.tokens)
            finish = progress.finish
        engine.release(slot)
        return whole + said.close(), finish, len(tokens), count

    return answer


def frames(path: pathlib.Path, kind="video", count=8, **clip) -> np.ndarray:
    return reading.sample(Media(kind, str(path), **clip), FrameConfig(max_frames=count), 12)[0]


def ask(client, *parts, **fields):
    messages = [{"role": "user", "content": list(parts)}]
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages, "max_tokens": 40} | SEEDED | fields
    )


def test_models(client):
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "storm_jax"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt")


def test_equal_to_the_engine(client, direct, media):
    answer = ask(client, video(data_url(media / "clip.mp4")), words("What?"))
    turns = [Turn("user", "<video>\nWhat?")]
    said, finish, prompt, count = direct(turns, [frames(media / "clip.mp4")], max_new_tokens=40)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (said, finish)
    assert choice.message.role == "assistant" and answer.object == "chat.completion"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, count)
    assert usage.total_tokens == prompt + count
    assert usage.storm["frames"] == 8 and usage.storm["visual_tokens"] == 4 * GROUP
    assert usage.storm["mixed_tokens"] == 8 * RUN.model.frame_tokens


def test_stream(client, direct, media):
    parts = video(data_url(media / "clip.mp4")), words("And this?")
    whole = ask(client, *parts)
    chunks = list(ask(client, *parts, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content for c in chunks[:-1]]
    assert "".join(filter(None, texts)) == whole.choices[0].message.content
    assert len(list(filter(None, texts))) > 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.storm["first_token_seconds"] > 0
    assert len({c.id for c in chunks}) == 1
    plain = list(ask(client, *parts, stream=True))
    assert all(c.usage is None and c.choices for c in plain)


def test_events_on_the_wire(served):
    message = {"role": "user", "content": "Hello"}
    body = {"model": MODEL, "messages": [message], "stream": True, "max_tokens": 3}
    answer = served.post(body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_conversation(client, direct, media):
    url = data_url(media / "picture.png", "image/png")
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": [image(url), words("What?")]},
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": "Which?"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=20, **SEEDED)
    turns = [
        Turn("system", "Short."),
        Turn("user", "<image>\nWhat?"),
        Turn("assistant", "A thing."),
        Turn("user", "Which?"),
    ]
    pictures = [frames(media / "picture.png", "image")]
    said, _, prompt, _ = direct(turns, pictures, max_new_tokens=20)
    assert answer.choices[0].message.content == said and answer.usage.prompt_tokens == prompt
    returned = answer.choices[0].message.model_dump()  # as clients send it back
    messages += [returned, {"role": "user", "content": "Why?"}]
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)


def test_a_further_turn_computes_what_is_new(client, direct, media):
    url = data_url(media / "picture.png", "image/png")
    messages = [{"role": "user", "content": [image(url), words("What?")]}]

    def asked(**sampling):
        return client.chat.completions.create(model=MODEL, messages=messages, **sampling)

    for seed in range(200):  # until an answer reads as the tokens it was made of
        answer = asked(max_tokens=2, seed=seed, temperature=1.0)
        said = answer.choices[0].message.content
        if len(said) == 2 and said.isascii() and said.isalnum():
            break
    else:
        pytest.fail("no answer of two letters")
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Which?"}]
    further = asked(max_tokens=20, **SEEDED)
    held = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert further.usage.prompt_tokens_details.cached_tokens == held
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", said), Turn("user", "Which?")]
    pictures = [frames(media / "picture.png", "image")]
    expected, _, prompt, _ = direct(turns, pictures, max_new_tokens=20)
    assert (further.choices[0].message.content, further.usage.prompt_tokens) == (expected, prompt)


def test_text_that_spells_placeholders(client, direct, media, tokenizer):
    spelled = "Is <video> a word, or <image>?"
    answer = ask(client, video(data_url(media / "clip.mp4")), words(spelled), max_tokens=5)
    expected = len(tokenizer(spelled)["input_ids"]) - len(tokenizer("What?")["input_ids"])
    other = ask(client, video(data_url(media / "clip.mp4")), words("What?"), max_tokens=5)
    assert answer.usage.prompt_tokens - other.usage.prompt_tokens == expected
    assert answer.usage.storm["media"] == 1
    alone = ask(client, words("<video>"), max_tokens=5)
    assert alone.usage.storm == alone.usage.storm | {"media": 0, "visual_tokens": 0, "frames": 0}


def test_media_in_all_forms(client, direct, media):
    """Files, folders, lists and data URLs are what they are on disk."""
    shown = [media / "frames" / f"{i}.png" for i in range(5)]
    pictures = np.concatenate([frames(p, "image") for p in shown])
    urls = [data_url(p, "image/png") for p in shown]
    joined = "data:video/jpeg;base64," + ",".join(u.split(",")[1] for u in urls)
    listed = [{"type": "video", "video": urls}, video(joined)]
    listed += [{"type": "video", "video": [f"file://{p}" for p in shown]}]
    listed += [video(f"file://{media / 'frames'}")]
    said, *_ = direct([Turn("user", "<video>\nWhat?")], [pictures], max_new_tokens=40)
    for part in listed:
        answer = ask(client, part, words("What?"))
        assert answer.choices[0].message.content == said
        assert answer.usage.storm["frames"] == 5
    clip = frames(media / "clip.mp4", start=0.2, end=0.7, count=4)
    said, *_ = direct([Turn("user", "<video>\nWhat?")], [clip], max_new_tokens=40)
    part = video(f"file://{media / 'clip.mp4'}", start=0.2, end=0.7)
    answer = ask(client, part, words("What?"), extra_body={"frames": 4})
    assert answer.choices[0].message.content == said


def test_order_of_several_media(client, direct, media):
    parts = [
        words("First"),
        image(data_url(media / "picture.png", "image/png")),
        video(data_url(media / "clip.mp4")),
        words("then?"),
    ]
    shown = [frames(media / "picture.png", "image"), frames(media / "clip.mp4")]
    turns = [Turn("user", "First\n<image>\n<video>\nthen?")]
    said, *_ = direct(turns, shown, max_new_tokens=40)
    assert ask(client, *parts).choices[0].message.content == said
    swapped = [parts[0], parts[2], parts[1], parts[3]]
    assert ask(client, *swapped).choices[0].message.content != said


def test_encoded_media_are_kept_by_content(served, client, media):
    path = media / "copy.mp4"
    path.write_bytes((media / "clip.mp4").read_bytes() + b"\0\0\0\x08free")  # new content
    before = served.metric("storm_visual_cache_misses_total")
    first = ask(client, video(data_url(path)), words("a"), max_tokens=3)
    again = ask(client, video(f"file://{path}"), words("b"), max_tokens=3)
    assert (first.usage.storm["media_cached"], again.usage.storm["media_cached"]) == (0, 1)
    fewer = ask(client, video(f"file://{path}"), words("b"), extra_body={"frames": 3})
    part = ask(client, video(f"file://{path}", start=0.2), words("b"))
    assert fewer.usage.storm["media_cached"] == part.usage.storm["media_cached"] == 0
    assert fewer.usage.storm["frames"] == 3
    assert served.metric("storm_visual_cache_misses_total") == before + 3
    path.write_bytes((media / "other.mp4").read_bytes())  # the same name, other content
    changed = ask(client, video(f"file://{path}"), words("b"))
    assert changed.usage.storm["media_cached"] == 0


def test_temporal_sampling(client, direct, media):
    part = video(data_url(media / "clip.mp4"))
    tokens = []
    for every in (1, 2, 3):
        answer = ask(client, part, words("x"), extra_body={"temporal_sampling": every})
        tokens.append(answer.usage.storm["visual_tokens"])
    assert tokens == [4 * GROUP, 2 * GROUP, 2 * GROUP]


def test_sampling(client, media):
    part = video(data_url(media / "clip.mp4"))

    def said(**fields):
        extra = {k: fields.pop(k) for k in ("top_k", "min_p", "repetition_penalty") if k in fields}
        answer = ask(client, part, words("x"), extra_body=extra, **fields)
        return answer.choices[0].message.content

    hot = said(temperature=1.5, seed=3)
    assert hot == said(temperature=1.5, seed=3) != said(temperature=1.5, seed=4)
    assert said(temperature=1.5, seed=None) != said(temperature=1.5, seed=None)
    greedy = said(temperature=0)
    assert greedy == said(temperature=1.5, top_k=1) == said(temperature=1.5, min_p=1.0)
    assert greedy == said(temperature=1.5, top_p=1e-6)
    assert greedy != said(repetition_penalty=2.0)
    said(seed=-(2**63))


def test_stop_strings(client, media):
    part = video(data_url(media / "clip.mp4"))
    fields = dict(max_tokens=200, temperature=0, extra_body={"repetition_penalty": 1.5})
    whole = ask(client, part, words("x"), **fields)
    content = whole.choices[0].message.content
    stop = content[20:23]
    assert len(stop) == 3
    for stream in (False, True):
        answer = ask(client, part, words("x"), stop=["\0none", stop], stream=stream, **fields)
        if stream:
            chunks = list(answer)
            text_ = "".join(c.choices[0].delta.content or "" for c in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            text_ = answer.choices[0].message.content
            finish = answer.choices[0].finish_reason
        assert text_ == content[: content.index(stop)] and finish == "stop"


def test_longest_answer(client, loaded, tokenizer):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_completion_tokens=3
    )
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}]
    )
    assert answer.usage.completion_tokens == SETTINGS.max_tokens


def test_many_at_once_are_each_answered_alone(served, direct, media):
    """More clients than slots, all different, streamed or not."""
    clips = [frames(media / "clip.mp4"), frames(media / "other.mp4")]
    urls = [data_url(media / "clip.mp4"), data_url(media / "other.mp4")]

    async def one(client, i):
        parts = [video(urls[i % 2]), words("What " * (i % 5) + str(i))]
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": parts}],
            max_tokens=20 + i,
            stream=i % 3 == 0,
            **SEEDED,
        )
        if i % 3:
            return answer.choices[0].message.content
        return "".join([c.choices[0].delta.content or "" async for c in answer])

    async def everyone():
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="any", max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, i) for i in range(12)))

    for i, said in enumerate(asyncio.run(everyone())):
        turns = [Turn("user", "<video>\n" + "What " * (i % 5) + str(i))]
        assert said == direct(turns, [clips[i % 2]], max_new_tokens=20 + i)[0], i
    served.idle()


def test_metrics_count(served, client, media):
    names = ("storm_prompt_tokens_total", "storm_answer_tokens_total", "storm_requests_total")
    before = {name: served.metric(name) for name in names}
    answer = ask(client, video(data_url(media / "clip.mp4")), words("x"), max_tokens=7)
    served.idle()
    grown = [served.metric(name) - before[name] for name in names]
    assert grown == [answer.usage.prompt_tokens, answer.usage.completion_tokens, 1]
    assert served.metric("storm_slots") == 4
    assert served.metric("process_resident_memory_bytes") > 1e7
    assert served.metric("storm_time_to_first_token_seconds_count") > 0


def test_health_and_page(served):
    assert served.client.get("/health").json() == {"status": "ok"}
    page = served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for sign in ("http://", "https://", 'src="', "@import", "<link"):
        assert sign not in page.text


def test_api_key(loaded, tokenizer):
    settings = dataclasses.replace(SETTINGS, api_key="key")
    with running(loaded, tokenizer, settings) as locked:
        for name in ("/v1/models", f"/v1/models/{MODEL}", "/metrics"):
            assert locked.client.get(name).status_code == 401
            right = {"Authorization": "Bearer key"}
            assert locked.client.get(name, headers=right).status_code == 200
        assert locked.ask("hello").status_code == 401
        for key in ("ke", "keys", "kéy", "Key"):
            bad = locked.post({}, headers={"Authorization": f"Bearer {key}".encode()})
            assert bad.status_code == 401 and bad.json()["error"]["code"] == "invalid_api_key"
        assert locked.client.get("/health").status_code == 200
        assert locked.client.get("/").status_code == 200
        with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="key") as client:
            assert ask(client, words("hello"), max_tokens=2).usage.completion_tokens == 2
        with (
            openai.OpenAI(base_url=f"{locked.url}/v1", api_key="no") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            ask(client, words("hello"))
