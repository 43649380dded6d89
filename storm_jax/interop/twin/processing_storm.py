"""Processor of an exported STORM model: chats, videos and images in, tensors out.

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                           return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs)

The files beside this one are the trainer's own: the same decoder, frame policy and tokenization,
so that pixels and token ids are those of training, bit for bit. Needed besides transformers: PyAV.

Outputs, a `BatchFeature`:

    input_ids            int64 [B, S]; every position of a visual token holds `video_token_id`
    attention_mask       int64 [B, S]
    pixel_values_videos  float32 [F, 3, H, W] in [-1, 1], the frames of all media in their order
    frame_counts         int64 [media]; an image is a video of one frame
    assistant_masks      int64 [B, S], on request: 1 where the model learns to speak

The last but two are left out where no text has media. Rows are padded on the left.

`video_token` is a token that the decoder's tokenizer had for the purpose (`<|video_pad|>`,
`<image_soft_token>`) or one added behind the others; its id may lie outside the decoder's
vocabulary, and its embedding is never used. Prompts spell `<video>` or `<image>` instead, once for
each medium, and may not spell `video_token`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from storm_jax.data.conversation import Turn
from storm_jax.data.text import (
    PLACEHOLDER,
    Encoded,
    Template,
    TemplateError,
    encode,
    encode_prompt,
    expand,
    spelled,
)
from storm_jax.frames import VISUAL, FrameConfig, ReductionConfig
from storm_jax.interop.twin.media_storm import Medium, assign, load, normalise, read_chat


class StormProcessor(ProcessorMixin):
    """Tokenizer, frame policy and token counts of one exported model."""

    def __init__(
        self,
        tokenizer,
        chat_format: Template,
        video_token: str,
        image_size: int,
        max_frames: int,
        fps: float,
        keyframes_only: bool,
        decode_timeout: float,
        temporal_pool: int,
        temporal_sampling: int,
        group_tokens: int,
        chat_template: str | None = None,
    ):
        """Every argument is kept as an attribute of its name and saved in processor_config.json.

        Args:
          tokenizer: a fast tokenizer that has `video_token`.
          chat_format: "gemma" or "qwen2"; see text_storm.py.
          video_token: stands at positions of visual tokens.
          image_size: side of the square frames, pixels.
          max_frames, fps, keyframes_only: the frame policy; see `FrameConfig` in frames_storm.py.
          decode_timeout: seconds that one media file may take.
          temporal_pool, temporal_sampling: of the model's token reduction; see `ReductionConfig`.
          group_tokens: visual tokens of a pooled frame.
          chat_template: the Jinja form of `chat_format`.
        """
        super().__init__(tokenizer, chat_template=chat_template)
        self.chat_format = chat_format
        self.video_token = video_token
        self.image_size = image_size
        self.max_frames = max_frames
        self.fps = fps
        self.keyframes_only = keyframes_only
        self.decode_timeout = decode_timeout
        self.temporal_pool = temporal_pool
        self.temporal_sampling = temporal_sampling
        self.group_tokens = group_tokens

    @property
    def video_token_id(self) -> int:
        """Id at positions of visual tokens."""
        return self.tokenizer.convert_tokens_to_ids(self.video_token)

    @property
    def model_input_names(self) -> list[str]:
        """What the model's `forward` takes of the outputs."""
        return ["input_ids", "attention_mask", "pixel_values_videos", "frame_counts"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        num_frames: int | None = None,
        max_frames: int | None = None,
        fps: float | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = None,
        add_special_tokens: bool = False,
    ) -> BatchFeature:
        """Inputs of the model from rendered prompts.

        Args:
          images: one for each `<image>`: a path, the file's bytes, a PIL image or uint8 [H, W, 3].
          text: a prompt or a batch of them, special tokens spelled out, as
            `apply_chat_template(..., tokenize=False)` returns it. No others are added.
          videos: one for each `<video>`: the path of a file or of a folder of frames, the file's
            bytes, uint8 [F, H, W, 3] or a list of pictures, or {"video": one of these, "start":
            s, "end": s} for a clip of a file. Media of a batch are listed one after the other, or
            as one list for each text. Pictures in memory have no clock: all are taken, or
            `max_frames` spread evenly over them.
          num_frames: so many evenly spaced frames of each video, or all where it has fewer.
          max_frames, fps: replace these parts of the stored frame policy; fps=0 spreads evenly.
          padding: True or "longest", False.
          padding_side: "left" or "right".
          return_tensors: "pt", "np"; None: lists and arrays.
          add_special_tokens: only False is offered.

        Raises:
          ValueError: placeholders and media do not match, or one of the arguments is no such thing.
          MediaError: (a ValueError) a medium cannot be read; it says which and why.
        """
        if text is None:
            raise ValueError("give text: a prompt with <video> or <image> where the media belong")
        if add_special_tokens:
            raise ValueError("add_special_tokens=True: the prompt must spell its special tokens")
        texts = [text] if isinstance(text, str) else list(text)
        queues = {
            "<video>": iter(assign("video", videos, texts)),
            "<image>": iter(assign("image", images, texts)),
        }
        media = [[next(queues[mark]) for mark in PLACEHOLDER.findall(prompt)] for prompt in texts]
        frames = self._frames(media, self._policy(num_frames, max_frames, fps))
        encoded = [
            expand(self._tokenize(prompt), self._visual_counts(own))
            for prompt, own in zip(texts, frames, strict=True)
        ]
        return self._batch(encoded, frames, padding, padding_side, return_tensors, False)

    # pyrefly: ignore[bad-override]  # no **kwargs: an unknown name is an error
    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: None = None,
        documents: None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        *,
        num_frames: int | None = None,
        max_frames: int | None = None,
        fps: float | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
    ) -> Any:
        """Renders chats, and with `tokenize` reads their media and makes the model's inputs.

        Args:
          conversation: messages {"role": "system", "user" or "assistant", "content": text or
            parts}, or a list of such lists. Parts are {"type": "text", "text": ...} and
            {"type": "video" or "image", and under "video" or "image", "path" or "url" what
            `__call__` takes, a local path for example}; a video file may have "start" and "end",
            seconds. Parts are joined with nothing between them.
          chat_template: a Jinja template instead of the processor's.
          tools, documents, continue_final_message: nothing but their defaults is offered.
          add_generation_prompt: end where the next answer begins.
          return_assistant_tokens_mask: adds `assistant_masks`.
          tokenize: False returns the rendered text, with <video> and <image> for the media.
          return_dict: all outputs, else input_ids alone.
          load_audio_from_video: without effect, the model has no ears.
          processor_kwargs: may hold any of the arguments after `sanitize_control_tokens`.
          sanitize_control_tokens: without effect: chats in the model's own template never spell
            special tokens.
          num_frames, max_frames, fps, padding, padding_side, return_tensors: as `__call__`.

        Raises:
          ValueError: as `__call__`; also a part of unknown type, or one without its medium.
          TemplateError: (a ValueError) the chat format has no form for these turns.
        """
        for name, value in (
            ("tools", tools),
            ("documents", documents),
            ("continue_final_message", continue_final_message),
        ):
            if value:
                raise ValueError(f"{name}={value!r}: the chat template has no place for it")
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template, add_generation_prompt=add_generation_prompt
            )
        call: dict[str, Any] = {
            "num_frames": num_frames,
            "max_frames": max_frames,
            "fps": fps,
            "padding": padding,
            "padding_side": padding_side,
            "return_tensors": None if return_tensors == "auto" else return_tensors,
        }
        if unknown := sorted(set(processor_kwargs or {}) - set(call)):
            raise TypeError(f"processor_kwargs: unknown {unknown}; known are {sorted(call)}")
        call |= processor_kwargs or {}
        masks = return_assistant_tokens_mask
        if masks and add_generation_prompt:
            raise ValueError(
                "return_assistant_tokens_mask is for whole conversations: leave out"
                " add_generation_prompt"
            )
        if not conversation:
            raise ValueError("no messages: a conversation needs at least one turn")
        single = isinstance(conversation[0], Mapping)
        chats = [conversation] if single else conversation
        turns, media = zip(*(read_chat(chat) for chat in chats), strict=True)
        rendered = super().apply_chat_template(
            [list(chat) for chat in chats],
            chat_template,
            add_generation_prompt=add_generation_prompt,
        )
        policy = self._policy(call["num_frames"], call["max_frames"], call["fps"])
        frames = self._frames(media, policy)
        encoded = [
            self._encode(prompt, said, self._visual_counts(own), add_generation_prompt, masks)
            for prompt, said, own in zip(rendered, turns, frames, strict=True)
        ]
        form = call["padding"], call["padding_side"], call["return_tensors"]
        out = self._batch(encoded, frames, *form, masks)
        return out if return_dict else out["input_ids"]

    def _policy(
        self, num_frames: int | None, max_frames: int | None, fps: float | None
    ) -> FrameConfig:
        """The stored frame policy with a call's changes."""
        if num_frames is None:
            most = self.max_frames if max_frames is None else max_frames
            return FrameConfig(most, self.fps if fps is None else fps, self.keyframes_only)
        if max_frames is not None or fps is not None:
            raise ValueError(
                f"num_frames={num_frames} takes evenly spaced frames: leave out max_frames and fps"
            )
        return FrameConfig(num_frames, 0.0, self.keyframes_only)

    def _visual_counts(self, frames: Iterable[np.ndarray]) -> list[int]:
        """Visual tokens that the model makes of each medium."""
        reduction = ReductionConfig(self.temporal_pool, 1, self.temporal_sampling)
        return [reduction.groups(len(own)) * self.group_tokens for own in frames]

    def _encode(
        self,
        rendered: str,
        turns: Sequence[Turn],
        counts: Sequence[int],
        prompt: bool,
        masks: bool,
    ) -> Encoded:
        """Token ids of a chat: the trainer's own where it is rendered as in training."""
        own = (self.tokenizer, self.chat_format, turns, counts)
        try:
            same = spelled(self.chat_format, turns, prompt) == rendered
        except TemplateError:  # the user's own template may have a form for it
            same = False
        if masks and not same:
            raise ValueError(
                "return_assistant_tokens_mask: what is learnt is known for the model's own chat"
                " template only"
            )
        if not same:
            return expand(self._tokenize(rendered), counts)
        if prompt:
            tokens = encode_prompt(*own)
            return Encoded(tokens, np.zeros(len(tokens), bool))
        return encode(*own)

    def _tokenize(self, text: str) -> Encoded:
        """Token ids of a rendered text, VISUAL once for each placeholder."""
        ids: list[int] = []
        for number, piece in enumerate(PLACEHOLDER.split(text)):
            ids += [VISUAL] if number else []
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        if self.video_token_id in ids:
            raise ValueError(
                f"the text spells {self.video_token}, which marks visual tokens; write <video> or"
                " <image> where a medium belongs, once"
            )
        return Encoded(np.array(ids, np.int32), np.zeros(len(ids), bool))

    def _frames(
        self, media: Sequence[Sequence[Medium]], policy: FrameConfig
    ) -> list[list[np.ndarray]]:
        """uint8 [F, image_size, image_size, 3] for each medium of each text."""
        size, timeout = self.image_size, self.decode_timeout
        return [[load(medium, policy, size, timeout) for medium in own] for own in media]

    def _batch(
        self,
        encoded: Sequence[Encoded],
        frames: Sequence[Sequence[np.ndarray]],
        padding: bool | str,
        padding_side: str,
        return_tensors: str | None,
        masks: bool,
    ) -> BatchFeature:
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding={padding!r}: True, False or 'longest' are offered")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: 'left' or 'right'")
        longest = max(len(row.tokens) for row in encoded)
        columns: dict[str, list[np.ndarray]] = {"input_ids": [], "attention_mask": []}
        if masks:
            columns["assistant_masks"] = []
        for row in encoded:
            missing = longest - len(row.tokens) if padding else 0
            sides = (missing, 0) if padding_side == "left" else (0, missing)
            ids = np.where(row.tokens == VISUAL, self.video_token_id, row.tokens).astype(np.int64)
            pad = self.tokenizer.pad_token_id or 0
            columns["input_ids"].append(np.pad(ids, sides, constant_values=pad))
            columns["attention_mask"].append(np.pad(np.ones_like(ids), sides))
            if masks:
                columns["assistant_masks"].append(np.pad(row.loss.astype(np.int64), sides))
        data: dict[str, Any] = {n: [row.tolist() for row in rows] for n, rows in columns.items()}
        media = [own for row in frames for own in row]
        if media:
            data["pixel_values_videos"] = normalise(media)
            data["frame_counts"] = np.array([len(own) for own in media], np.int64)
        return BatchFeature(data, tensor_type=return_tensors)
