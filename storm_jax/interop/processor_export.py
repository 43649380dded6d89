"""The processor of an exported model: tokenizer, chat template, settings and source files."""

import json
import re
from pathlib import Path

from storm_jax.config import RunConfig
from storm_jax.data.text import load_tokenizer

# Where the tokenizer has one of these, it stands at positions of visual tokens; else the first of
# them is added behind its other tokens.
VIDEO_TOKENS = ("<|video_pad|>", "<image_soft_token>")

_PACKAGE = Path(__file__).parents[1]
_TWIN = _PACKAGE / "interop" / "twin"
_SOURCES = (
    _TWIN / "processing_storm.py",
    _TWIN / "media_storm.py",
    _PACKAGE / "frames.py",
    _PACKAGE / "data" / "container.py",
    _PACKAGE / "data" / "conversation.py",
    _PACKAGE / "data" / "text.py",
    _PACKAGE / "data" / "video.py",
)


def write_processor(config: RunConfig, tokenizer: str, out: Path) -> int:
    """Writes all that `AutoProcessor.from_pretrained(out, trust_remote_code=True)` needs.

    tokenizer.json, tokenizer_config.json, chat_template.jinja, processor_config.json, and the
    source files: this project's own, whose imports become relative.

    Args:
      config: of the run that the checkpoint is from.
      tokenizer: as `load_tokenizer` takes it.
      out: a folder, made where it is missing.

    Returns:
      Id of the token at positions of visual tokens; may be outside the decoder's vocabulary.

    Raises:
      TokenizerError: the tokenizer cannot be loaded.
    """
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_tokenizer(tokenizer)
    vocabulary = loaded.get_vocab()
    video_token = next((t for t in VIDEO_TOKENS if t in vocabulary), VIDEO_TOKENS[0])
    # Also where it is there already: as a special token it cannot be spelled by data.
    loaded.add_special_tokens(
        {"extra_special_tokens": [video_token]}, replace_extra_special_tokens=False
    )
    template = config.data.chat_template
    # The published template of the tokenizer, if it has one, knows no videos.
    loaded.chat_template = (_TWIN / f"{template}.jinja").read_text()
    loaded.padding_side = "left"  # an attribute is saved only where init_kwargs name it
    loaded.init_kwargs |= {"padding_side": "left", "processor_class": "StormProcessor"}
    loaded.save_pretrained(out)

    frames, reduction = config.data.frames, config.model.reduction
    settings = {
        "auto_map": {"AutoProcessor": "processing_storm.StormProcessor"},
        "processor_class": "StormProcessor",
        "chat_format": template,
        "video_token": video_token,
        "image_size": config.model.vit.image_size,
        "max_frames": frames.max_frames,
        "fps": frames.fps,
        "keyframes_only": frames.keyframes_only,
        "decode_timeout": config.data.decode_timeout,
        "temporal_pool": reduction.temporal_pool,
        "temporal_sampling": reduction.temporal_sampling,
        "group_tokens": config.model.group_tokens,
    }
    (out / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for path in _SOURCES:
        (out / _shipped_name(path.stem)).with_suffix(".py").write_text(relative(path.read_text()))
    return loaded.get_vocab()[video_token]


def relative(source: str) -> str:
    """A source file with its imports from storm_jax as imports from files beside it.

    `from storm_jax.data.video import x` becomes `from .video_storm import x`. transformers finds
    the files that remote code needs by imports of this form.
    """
    source = re.sub(
        r"^from storm_jax\.(?:\w+\.)*(\w+) import",
        lambda match: f"from .{_shipped_name(match[1])} import",
        source,
        flags=re.MULTILINE,
    )
    left = re.search(r"^\s*(from|import) storm_jax.*", source, re.MULTILINE)
    assert left is None, f"{left[0]}: only `from storm_jax.module import name` can be exported"
    return source


def _shipped_name(module: str) -> str:
    return module if module.endswith("_storm") else f"{module}_storm"
