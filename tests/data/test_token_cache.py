"""Tokens kept beside a data set."""

import json
import pickle

import pytest

from storm_jax.config import VISUAL
from storm_jax.data import text, token_cache
from storm_jax.data.formats.json_file import JsonFile
from storm_jax.data.records import Media


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer("bytes")


def write(path, count=3):
    lines = []
    for i in range(count):
        media = [
            {"type": "video", "path": "v.mp4", "start": 1.5},
            {"type": "image", "path": f"{i}.png"},
        ][: i % 3]
        question = "".join(f"<{m['type']}>" for m in media) + f"what {i}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "ok"}]
        lines.append(json.dumps({"id": i, "media": media, "conversations": turns}))
    path.write_text("\n".join(lines) + "\n")
    return JsonFile(str(path))


def folders(path):
    return sorted(p.name for p in path.iterdir())


def test_content(tmp_path, tokenizer):
    records = write(tmp_path / "a.jsonl", 1200)  # more than two chunks
    cache = token_cache.open_or_build(records, tokenizer, "qwen2")
    assert len(cache) == 1200 and cache.errors == {}
    media, which = cache.distinct_media()
    place = 0
    for number in (*range(7), 511, 512, 513, 1199):
        turns = records[number].turns
        (expected,) = text.encode_unexpanded(tokenizer, "qwen2", [turns])
        got = cache.text(number)
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.loss.tolist() == expected.loss.tolist()
        assert cache.text_tokens()[number] == (expected.tokens != VISUAL).sum()
    for number in range(1200):
        count = cache.media_counts()[number]
        its = tuple(media[i] for i in which[place : place + count])
        assert its == records[number].media
        place += count
    assert Media("video", str(tmp_path / "v.mp4"), 1.5, None) in media
    assert len(media) == 1 + 400


def test_second_opening_reads_what_the_first_wrote(tmp_path, tokenizer):
    records = write(tmp_path / "a.jsonl")
    token_cache.open_or_build(records, tokenizer, "gemma")
    (key,) = folders(tmp_path / "a.jsonl.tokens")
    stamp = (tmp_path / "a.jsonl.tokens" / key / "tokens.i32").stat().st_mtime_ns
    tokenizer(["a longer text", "b"], padding=True, truncation=True, max_length=4)
    cache = token_cache.open_or_build(JsonFile(records.path), tokenizer, "gemma")
    assert folders(tmp_path / "a.jsonl.tokens") == [key]
    assert (tmp_path / "a.jsonl.tokens" / key / "tokens.i32").stat().st_mtime_ns == stamp
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.text(1).tokens.tolist() == cache.text(1).tokens.tolist()
    assert len(pickle.dumps(cache)) < 1000


def test_another_template_tokenizer_or_file_is_another_cache(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    token_cache.open_or_build(write(path), tokenizer, "gemma")
    token_cache.open_or_build(JsonFile(str(path)), tokenizer, "qwen2")
    assert len(folders(tmp_path / "a.jsonl.tokens")) == 2
    other = text.load_tokenizer("bytes")
    other.add_tokens(["what"])
    cache = token_cache.open_or_build(JsonFile(str(path)), other, "gemma")
    assert 264 in cache.text(0).tokens
    assert len(folders(tmp_path / "a.jsonl.tokens")) == 3
    cache = token_cache.open_or_build(write(path, 5), tokenizer, "gemma")
    assert len(cache) == 5
    assert len(folders(tmp_path / "a.jsonl.tokens")) == 4


def test_records_that_cannot_be_used(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, 4)
    lines = path.read_text().splitlines()
    no_answer = {"id": "x", "conversations": [{"from": "human", "value": "?"}]}
    path.write_text("\n".join([lines[0], "{", lines[1], json.dumps(no_answer), *lines[2:]]))
    cache = token_cache.open_or_build(JsonFile(str(path)), tokenizer, "gemma")
    assert sorted(cache.errors) == [1, 3]
    assert "not JSON" in cache.errors[1] and "answer" in cache.errors[3]
    assert len(cache.text(1).tokens) == 0
    (expected,) = text.encode_unexpanded(tokenizer, "gemma", [JsonFile(str(path))[4].turns])
    assert cache.text(4).tokens.tolist() == expected.tokens.tolist()
    assert cache.media_counts().tolist() == [0, 0, 1, 0, 2, 0]


def test_tokenizer_of_another_template_is_an_error_not_bad_records(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(text.TokenizerError, match="no token <bos>"):
        token_cache.open_or_build(write(tmp_path / "a.jsonl"), tokenizer, "gemma")
    assert folders(tmp_path / "a.jsonl.tokens") == []  # no half-written cache


def test_data_set_whose_folder_cannot_be_written(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "a.jsonl.tokens").write_text("in the way")  # permissions do not stop root
    records = write(tmp_path / "a.jsonl")
    first = token_cache.open_or_build(records, tokenizer, "gemma")
    assert first.text(0).tokens.size
    again = token_cache.open_or_build(records, tokenizer, "gemma")
    assert pickle.dumps(again) == pickle.dumps(first)
    assert "home" in str(pickle.loads(pickle.dumps(first)).__reduce__()[1][0])


def test_empty_file(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("")
    cache = token_cache.open_or_build(JsonFile(str(path)), tokenizer, "gemma")
    assert len(cache) == 0 and cache.text_tokens().shape == (0,)
    assert cache.distinct_media()[0] == []
