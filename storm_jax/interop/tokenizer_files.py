"""What travels with a tokenizer: its chat template, and how its model is meant to generate."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

    Args:
      tokenizer: from `load_tokenizer`. generation_config.json is taken from the folder or the
        repository that it was loaded from, where there is one.
      out: the folder, made where it is missing.
    """
    from transformers.utils import cached_file

    tokenizer.save_pretrained(out)
    source = tokenizer.name_or_path  # "" of one that was made here
    found = source and cached_file(
        source,
        GENERATION,
        local_files_only=Path(source).is_dir(),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found and Path(found).resolve() != (out / GENERATION).resolve():
        shutil.copyfile(found, out / GENERATION)
