"""What travels with a tokenizer from one folder to the next."""

from storm_jax.data import text
from storm_jax.interop.tokenizer_files import save_tokenizer


def test_all_of_it_travels(tmp_path):
    tokenizer = text.load_tokenizer("bytes")
    tokenizer.add_tokens(["word"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|object|>"]})
    tokenizer.chat_template = "{{ messages }}"
    source, again = tmp_path / "source", tmp_path / "again"
    save_tokenizer(tokenizer, source)
    assert not (source / "generation_config.json").exists()  # made here: there is none
    (source / "generation_config.json").write_text('{"temperature": 0.7}')

    save_tokenizer(text.load_tokenizer(str(source)), again)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (again / name).read_bytes() == (source / name).read_bytes()
    loaded = text.load_tokenizer(str(again))
    assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert loaded("a word<|object|>")["input_ids"] == tokenizer("a word<|object|>")["input_ids"]
    save_tokenizer(loaded, again)  # into the folder that it came from
    assert (again / "generation_config.json").read_text() == '{"temperature": 0.7}'
