"""The tokenizer that belongs to a checkpoint."""

import tempfile
from pathlib import Path

from storm_jax import checkpoint
from storm_jax.config import RunConfig
from storm_jax.data import text


def load_tokenizer(path: str, config: RunConfig):
    """The tokenizer that was saved beside the checkpoints, else the one that the config names.

    Args:
      path: a training workdir, or one checkpoint in it.
      config: that was saved with it.

    Raises:
      CheckpointError: there is no checkpoint.
      TokenizerError: the tokenizer cannot be had.
    """
    saved = checkpoint.find(path)[0].parent / "tokenizer"
    if not saved.is_dir():
        return text.load_tokenizer(config.data.tokenizer)
    if "://" not in str(saved):
        return text.load_tokenizer(str(saved))
    with tempfile.TemporaryDirectory() as folder:  # transformers reads files on a disk
        for file in saved.iterdir():
            file.copy(Path(folder) / file.name)
        return text.load_tokenizer(folder)
