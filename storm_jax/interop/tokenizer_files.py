"""What travels with a tokenizer: its chat template, and how its model is meant to generate."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

    Asks no hub.

    Args:
      tokenizer: from `load_tokenizer`. generation_config.json is taken from the folder that it was
        loaded from, where there is one.
      out: the folder, made where it is missing.
    """
    tokenizer.save_pretrained(out)
    source = tokenizer.name_or_path  # "" of one that was made here
    found = Path(source) / GENERATION
    if source and found.is_file() and found.resolve() != (out / GENERATION).resolve():
        shutil.copyfile(found, out / GENERATION)
