"""Every body is either a request or a refusal that says what is wrong with it."""

import json

import pytest

pytest.importorskip("pydantic")
from hypothesis import given, settings
from hypothesis import strategies as st

from storm_jax.data import text
from storm_jax.data.conversation import Turn
from storm_jax.frames import VISUAL
from storm_jax.serving import conversation, schema
from storm_jax.serving.errors import ApiError

ASKED = {"model": "m", "messages": [{"role": "user", "content": "What?"}]}


def refusal(body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        schema.parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


def user(*parts):
    return ASKED | {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_malformed_json(body):
    error = refusal(body)
    assert error.code == "invalid_json" and "is not JSON" in error.message


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"model": 3}, "model", "got 3"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "valid array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "or a list"),
        (user({"type": "audio"}), "messages[0].content[0]", "video_url"),
        (user({"type": "text"}), "messages[0].content[0].text", "required"),
        (user({"type": "text", "text": "a", "x": 1}), "messages[0].content[0].x", "no such field"),
        (user({"type": "image_url", "image_url": "u"}), "messages[0].content[0].image_url", "'u'"),
        (
            user({"type": "video_url", "video_url": {"url": "u", "start": "1"}}),
            "messages[0].content[0].video_url.start",
            "'1'",
        ),
        (user({"type": "video", "video": []}), "messages[0].content[0].video", "at least 1"),
        ({"temperature": "0.5"}, "temperature", "'0.5'"),
        ({"temperature": 2.5}, "temperature", "2.5"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": True}, "top_k", "True"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"max_tokens": 1.5}, "max_tokens", "1.5"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "mean the same"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stop": 3}, "stop", "list of strings"),
        ({"stop": ["a", 3]}, "stop[1]", "got 3"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"stop": ["a"] * 17}, "stop", "up to 16"),
        ({"frames": 0}, "frames", "got 0"),
        ({"unheard_of": 1}, "unheard_of", "no such field"),
        ({"n": 2}, "n", "one answer a request"),
        ({"logprobs": True}, "logprobs", "not returned"),
        ({"presence_penalty": 0.5}, "presence_penalty", "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not offered"),
        ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'json_object'"),
    ],
)
def test_wrong_fields(change, param, said):
    error = refusal(ASKED | change)
    assert error.param == param and said in error.message
    assert error.body()["error"]["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken():
    request = schema.parse(
        json.dumps(
            ASKED
            | {"n": 1, "logprobs": False, "presence_penalty": 0, "logit_bias": {}, "tools": []}
            | {"user": "me", "metadata": {"a": "b"}, "store": False, "tool_choice": "auto"}
            | {"response_format": {"type": "text"}, "temperature": 1, "stop": ["a", "b"]}
            | {"max_completion_tokens": 5}
        ).encode()
    )
    assert request.temperature == 1.0 and request.stop_strings == ("a", "b")
    assert request.new_tokens == 5


def test_half_a_character_is_not_json():
    """On this rests that no text can hold the mark of a medium."""
    for half in (r"\ud800", r"\udc00", r"a\udc00b", r"\udc00\ud800"):
        body = json.dumps(ASKED).replace("What?", half).encode()
        assert refusal(body).code == "invalid_json"
    raw = json.dumps(ASKED).encode().replace(b"What?", "\udc00".encode("utf-8", "surrogatepass"))
    refusal(raw)


def test_conversation_keeps_texts_that_spell_placeholders():
    parts = [
        {"type": "text", "text": "Before <image> and <video>:"},
        {"type": "video_url", "video_url": {"url": "data:,", "start": 1, "end": 2}},
        {"type": "video", "video": ["a", "b"]},
        {"type": "text", "text": "What?"},
    ]
    messages = [
        {"role": "developer", "content": "<video>"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "<image>"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "c"}}]},
    ]
    request = schema.parse(json.dumps(ASKED | {"messages": messages}).encode())
    turns, sources = conversation.read(request.messages)
    mark = conversation.MEDIUM
    assert turns == [
        Turn("system", "<video>"),
        Turn("user", f"Before <image> and <video>:\n{mark}\n{mark}\nWhat?"),
        Turn("assistant", "<image>"),
        Turn("user", mark),
    ]
    assert [(s.kind, s.urls, s.frames, s.start, s.end, s.where) for s in sources] == [
        ("video", ("data:,",), False, 1.0, 2.0, "messages[1].content[1]"),
        ("video", ("a", "b"), True, None, None, "messages[1].content[2]"),
        ("image", ("c",), False, None, None, "messages[3].content[0]"),
    ]
    tokenizer = text.load_tokenizer("bytes")
    counts = [5, 3, 2]
    tokens = text.encode_prompt(tokenizer, "gemma", turns, counts, conversation.PLACEHOLDER)
    assert (tokens == VISUAL).sum() == sum(counts)


def test_frames_in_one_data_url():
    part = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAA,BBB,CCC"}}
    request = schema.parse(json.dumps(user(part)).encode())
    (source,) = conversation.read(request.messages)[1]
    assert source.frames and source.urls == tuple(
        f"data:image/jpeg;base64,{x}" for x in ("AAA", "BBB", "CCC")
    )


def test_media_of_assistants():
    part = {"type": "image_url", "image_url": {"url": "c"}}
    body = ASKED | {"messages": [{"role": "assistant", "content": [part]}]}
    request = schema.parse(json.dumps(body).encode())
    with pytest.raises(ApiError, match=r"messages\[0\].content\[0\]: only users'"):
        conversation.read(request.messages)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted(schema.ChatRequest.model_fields)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "video_url", "video"]) | JSON},
    optional={
        "text": st.text(max_size=8) | JSON,
        "image_url": st.fixed_dictionaries({"url": st.text(max_size=8) | JSON}) | JSON,
        "video_url": st.fixed_dictionaries(
            {"url": st.text(max_size=8)}, optional={"start": JSON, "end": st.floats() | JSON}
        )
        | JSON,
        "video": st.lists(st.text(max_size=8), max_size=3) | JSON,
    },
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]) | JSON},
    optional={
        "content": st.text(max_size=8) | st.lists(PARTS, max_size=3) | JSON,
        "name": JSON,
        "refusal": JSON,
    },
)
REQUESTS = st.fixed_dictionaries(
    {"model": st.just("m") | JSON, "messages": st.lists(MESSAGES, max_size=3) | JSON},
    optional={
        name: JSON | st.integers(0, 3) | st.floats(0, 1)
        for name in FIELDS
        if name not in ("model", "messages")
    },
)


def check(body: bytes) -> None:
    """A request, or a refusal whose parts all fit into JSON."""
    try:
        request = schema.parse(body)
        turns, sources = conversation.read(request.messages)
    except ApiError as error:
        assert error.status == 400 and error.message
        assert json.loads(json.dumps(error.body()))["error"]["message"] == error.message
        error.message.encode()
        return
    assert request.new_tokens is None or request.new_tokens >= 1
    assert sum(turn.text.count(conversation.MEDIUM) for turn in turns) == len(sources)


@settings(max_examples=300, deadline=None)
@given(REQUESTS)
def test_fuzz_structured(request):
    check(json.dumps(request).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda x: json.dumps(x).encode()))
def test_fuzz_anything(body):
    check(body)
