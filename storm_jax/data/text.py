"""From conversations to token ids: tokenizers, chat templates, and the loss mask.

The two templates are the published ones (`\\n` is a line break; nothing else stands between turns):

gemma (Gemma 2 and 3; texts are stripped, turns alternate, system text goes before the first user's)

    <bos><start_of_turn>user\\n{system}\\n\\n{user}<end_of_turn>\\n
    <start_of_turn>model\\n{answer}<end_of_turn>\\n

qwen2 (Qwen2 and Qwen2-VL; without a system turn the system text is "You are a helpful assistant.")

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n{user}<|im_end|>\\n
    <|im_start|>assistant\\n{answer}<|im_end|>\\n

Each `<video>` or `<image>` in a turn becomes a run of VISUAL positions, with nothing around it.
Answers and the token that ends them carry the loss; the line break after that token does not. An
answer is tokenized apart from the `model\\n` or `assistant\\n` before it, as it is in generation.
Text that spells a special token ("<end_of_turn>") stays plain text: data cannot forge a turn.
"""

import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from storm_jax.data.conversation import Turn
from storm_jax.frames import VISUAL

if TYPE_CHECKING:  # transformers takes a second to import; data workers never need it
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Template = Literal["gemma", "qwen2"]

PLACEHOLDER = re.compile("<video>|<image>")

_TEMPLATE_TOKENS: dict[Template, tuple[str, ...]] = {
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "qwen2": ("<|im_start|>", "<|im_end|>"),
}
_QWEN2_SYSTEM = "You are a helpful assistant."


class _Piece(NamedTuple):
    """A piece of a rendered conversation."""

    kind: Literal["text", "special", "visual"]
    text: str
    loss: bool  # the model must learn to produce it


class TokenizerError(ValueError):
    """A tokenizer that cannot be had, or that lacks a token of the chat template."""


class TemplateError(ValueError):
    """A conversation that the chat template has no form for."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation.

    Attributes:
      tokens: int32 [n], VISUAL at positions of visual tokens.
      loss: bool [n], True where the token is part of an answer or ends one.
    """

    tokens: np.ndarray
    loss: np.ndarray


# ------------------------------------------------------------------------------------- tokenizers

# Of a repository: what belongs to a tokenizer, and how its model is meant to generate.
_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Loads a tokenizer.

    Args:
      name: "bytes" (one token a UTF-8 byte, id = byte, and the special tokens of both templates
        after them: 264 ids, nothing to download), a folder with tokenizer.json, or a hub id.

    Raises:
      TokenizerError: no such folder, and the hub does not serve that name either.
    """
    if name == "bytes":
        return _bytes_tokenizer()
    from huggingface_hub import snapshot_download
    from transformers import PreTrainedTokenizerFast

    folder = os.path.isdir(name)
    try:
        # All files of a hub id first: without a network, `from_pretrained` tries the hub for one
        # file after the other, minutes in all, even where they are in the cache.
        files = name if folder else snapshot_download(name, allow_patterns=list(_FILES))
        # Not AutoTokenizer: it may rebuild the tokenizer from Python code of the model's class,
        # while this one is tokenizer.json as it was published.
        return PreTrainedTokenizerFast.from_pretrained(files, local_files_only=True)
    except Exception as error:  # the hub client raises many types, some of them undocumented
        if folder:
            reason = "the folder holds no readable tokenizer.json"
        else:
            reason = "no such folder here, and the Hugging Face hub did not serve it"
        raise TokenizerError(
            f"cannot load tokenizer {name!r}: {reason}. Give a folder with tokenizer.json (and"
            f' tokenizer_config.json), or "bytes". ({type(error).__name__}: {error})'
        ) from error


BYTES_VOCAB = 264  # ids of the "bytes" tokenizer

_SPECIAL_TOKENS = (
    "<pad> <bos> <eos> <start_of_turn> <end_of_turn> <|im_start|> <|im_end|> <|endoftext|>".split()
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer for `texts`, with the special tokens of both templates.

    Args:
      texts: what it should be short on; any other text can still be encoded, byte by byte.
      vocab_size: ids, special tokens and 256 bytes included.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    _byte_level(tokenizer, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def _bytes_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    _byte_level(tokenizer, use_regex=False)
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == BYTES_VOCAB
    return _wrapped(tokenizer)


def _byte_level(tokenizer: "Tokenizer", use_regex: bool) -> None:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()


def _wrapped(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte, in byte order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown}
    table.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return [table[byte] for byte in range(256)]


def stop_tokens(tokenizer: "PreTrainedTokenizerFast", template: Template) -> tuple[int, ...]:
    """Ids that end an answer: the template's end of turn, then the end of text if there is one."""
    end, text_end = {
        "gemma": ("<end_of_turn>", "<eos>"),
        "qwen2": ("<|im_end|>", "<|endoftext|>"),
    }[template]
    ids = [_special_id(tokenizer, end)]
    last = tokenizer.get_vocab().get(text_end)
    return tuple(ids if last is None else [*ids, last])


def vocabulary_needed(tokenizer: "PreTrainedTokenizerFast", template: Template) -> int:
    """One more than the largest id that `encode` can return: what the decoder's table must hold.

    Special tokens that the template does not use can never come out, whatever a text spells:
    Gemma 3's tokenizer has one for images, whose id its text models do not know.
    """
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    plain = (id_ for id_ in tokenizer.get_vocab().values() if id_ not in special)
    used = [_special_id(tokenizer, token) for token in _TEMPLATE_TOKENS[template]]
    return 1 + max(*plain, *used)


def _special_id(tokenizer: "PreTrainedTokenizerFast", token: str) -> int:
    token_id = tokenizer.backend_tokenizer.token_to_id(token)
    if token_id is None:
        raise TokenizerError(
            f"tokenizer {tokenizer.name_or_path!r} has no token {token}: data.chat_template and"
            " data.tokenizer do not belong together"
        )
    return token_id


# -------------------------------------------------------------------------------------- templates


def spelled(template: Template, turns: Sequence[Turn], prompt: bool) -> str:
    """The conversation as one string: special tokens by name, placeholders as they are.

    With `prompt` up to where the next answer begins. Tokenizers turn the string into what `encode`
    and `encode_prompt` return, but for texts that spell special tokens and answers that begin with
    white space.

    Raises:
      TemplateError: turns that the template has no form for.
    """
    return "".join(piece.text for piece in _render(template, turns, prompt))


def _render(
    template: Template,
    turns: Sequence[Turn],
    prompt: bool,
    placeholder: re.Pattern[str] = PLACEHOLDER,
) -> list[_Piece]:
    """The conversation as pieces, in order; with `prompt` also the header of the answer to come."""
    if not turns:
        raise TemplateError("a conversation needs at least one turn")
    if any(turn.role == "system" for turn in turns[1:]):
        raise TemplateError("a system turn may only stand first")
    match template:
        case "gemma":
            pieces = _render_gemma(turns, placeholder)
            header = ("<start_of_turn>", "model\n")
        case "qwen2":
            pieces = _render_qwen2(turns, placeholder)
            header = ("<|im_start|>", "assistant\n")
    if prompt:
        if turns[-1].role != "user":
            raise TemplateError(f"a prompt ends with a user turn, not with {turns[-1].role}")
        pieces += [_Piece("special", header[0], False), _Piece("text", header[1], False)]
    return _merge_texts(pieces)


def _render_gemma(turns: Sequence[Turn], placeholder: re.Pattern[str]) -> list[_Piece]:
    pieces: list[_Piece] = [_Piece("special", "<bos>", False)]
    prefix = ""
    if turns[0].role == "system":
        prefix = turns[0].text + "\n\n"
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise TemplateError(
                f"turn {number} is of role {turn.role}: gemma's turns alternate, user first"
            )
        answer = turn.role == "assistant"
        pieces.append(_Piece("special", "<start_of_turn>", False))
        pieces.append(_Piece("text", "model\n" if answer else "user\n" + prefix, False))
        pieces += _content(turn.text.strip(), answer, placeholder)
        pieces += [_Piece("special", "<end_of_turn>", answer), _Piece("text", "\n", False)]
        prefix = ""
    return pieces


def _render_qwen2(turns: Sequence[Turn], placeholder: re.Pattern[str]) -> list[_Piece]:
    pieces: list[_Piece] = []
    if turns[0].role != "system":
        turns = [Turn(role="system", text=_QWEN2_SYSTEM), *turns]
    for turn in turns:
        answer = turn.role == "assistant"
        pieces += [
            _Piece("special", "<|im_start|>", False),
            _Piece("text", turn.role + "\n", False),
        ]
        pieces += _content(turn.text, answer, placeholder)
        pieces += [_Piece("special", "<|im_end|>", answer), _Piece("text", "\n", False)]
    return pieces


def _content(text: str, answer: bool, placeholder: re.Pattern[str]) -> list[_Piece]:
    pieces: list[_Piece] = []
    start = 0
    for match in placeholder.finditer(text):
        pieces.append(_Piece("text", text[start : match.start()], answer))
        pieces.append(_Piece("visual", match.group(), False))
        start = match.end()
    pieces.append(_Piece("text", text[start:], answer))
    return pieces


def _merge_texts(pieces: list[_Piece]) -> list[_Piece]:
    """Joins neighbouring texts of equal loss, so that they are tokenized as one string."""
    merged: list[_Piece] = []
    for kind, text, loss in pieces:
        if kind == "text" and not text:
            continue
        if merged and kind == "text" and merged[-1].kind == "text" and merged[-1].loss == loss:
            merged[-1] = _Piece("text", merged[-1].text + text, loss)
        else:
            merged.append(_Piece(kind, text, loss))
    return merged


# --------------------------------------------------------------------------------------- encoding


def encode(
    tokenizer: "PreTrainedTokenizerFast",
    template: Template,
    turns: Sequence[Turn],
    visual_counts: Sequence[int],
) -> Encoded:
    """Tokenizes a whole conversation for training.

    Args:
      turns: the conversation; texts hold one `<video>` or `<image>` for each medium.
      visual_counts: visual tokens of each medium, in the order of the placeholders.

    Raises:
      TemplateError: turns that the template has no form for.
      ValueError: not as many placeholders as visual counts.
      TokenizerError: the tokenizer lacks a token of the template.
    """
    return expand(encode_unexpanded(tokenizer, template, [turns])[0], visual_counts)


def encode_prompt(
    tokenizer: "PreTrainedTokenizerFast",
    template: Template,
    turns: Sequence[Turn],
    visual_counts: Sequence[int],
    placeholder: re.Pattern[str] = PLACEHOLDER,
    answer_prefix: str = "",
) -> np.ndarray:
    """Tokens (int32 [n]) up to where the assistant's next answer begins; see `encode`.

    Args:
      answer_prefix: what the answer begins with, which the model goes on from.
      placeholder: what stands for a medium in the turns, where texts of others may spell <video>.
    """
    pieces = _render(template, turns, prompt=True, placeholder=placeholder)
    if answer_prefix:  # tokenized apart from the header, as answers are in training
        pieces.append(_Piece("text", answer_prefix, False))
    return expand(_encode_pieces(tokenizer, [pieces])[0], visual_counts).tokens


def encode_next(tokenizer: "PreTrainedTokenizerFast", template: Template, text: str) -> np.ndarray:
    """Tokens (int32 [n]) between an answer and the next one, for a user's turn without media.

    They follow the answer without the token that ends it, which they begin with.
    """
    before, answer, turn = Turn("user", ""), Turn("assistant", ""), Turn("user", text)
    head = _render(template, (before,), prompt=True)
    pieces = _render(template, (before, answer, turn), prompt=True)
    assert pieces[: len(head)] == head
    return expand(_encode_pieces(tokenizer, [pieces[len(head) :]])[0], ()).tokens


def encode_unexpanded(
    tokenizer: "PreTrainedTokenizerFast",
    template: Template,
    conversations: Sequence[Sequence[Turn]],
) -> list[Encoded]:
    """Tokenizes many conversations, with a single VISUAL for each medium; `expand` does the rest.

    Lengths of videos are not needed for it, so the result can be kept beside the data set.
    """
    return _encode_pieces(tokenizer, [_render(template, t, prompt=False) for t in conversations])


def expand(encoded: Encoded, visual_counts: Sequence[int]) -> Encoded:
    """Repeats the i-th VISUAL visual_counts[i] times.

    Raises:
      ValueError: there are not as many counts as VISUAL positions.
    """
    visual = encoded.tokens == VISUAL
    if visual.sum() != len(visual_counts):
        raise ValueError(f"{visual.sum()} placeholders, but {len(visual_counts)} visual counts")
    repeats = np.ones(len(visual), np.int64)
    repeats[visual] = visual_counts
    return Encoded(np.repeat(encoded.tokens, repeats), np.repeat(encoded.loss, repeats))


def _encode_pieces(
    tokenizer: "PreTrainedTokenizerFast", conversations: list[list[_Piece]]
) -> list[Encoded]:
    texts = list({text: None for c in conversations for kind, text, _ in c if kind == "text"})
    ids = {}
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        ids = dict(zip(texts, encoded["input_ids"], strict=True))
    special = functools.cache(functools.partial(_special_id, tokenizer))
    results = []
    for pieces in conversations:
        tokens: list[int] = []
        loss: list[bool] = []
        for kind, text, learnt in pieces:
            match kind:
                case "text":
                    new = ids[text]
                case "special":
                    new = [special(text)]
                case "visual":
                    new = [VISUAL]
            tokens += new
            loss += [learnt] * len(new)
        results.append(Encoded(np.array(tokens, np.int32), np.array(loss, bool)))
    return results
