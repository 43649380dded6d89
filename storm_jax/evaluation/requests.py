"""A question as the engine gets it, and what came of it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from storm_jax.config import RunConfig
from storm_jax.data import text
from storm_jax.data.conversation import Media, Turn
from storm_jax.inference.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A question.

    Attributes:
      key: what the caller knows it by.
      media: in the order of their placeholders.
      turns: texts hold one placeholder for each medium.
      answer_prefix: what the answer begins with.
      groups: where one video's frames stand at several places: how many of the groups that the
        decoder sees stand at each placeholder.
      sampling: its stop tokens are those of the chat template.
      stop: texts before which the answer ends.
    """

    key: Hashable
    media: tuple[Media, ...]
    turns: tuple[Turn, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    answer_prefix: str = ""
    groups: tuple[int, ...] = ()

    def tokens(self, tokenizer, config: RunConfig, counts: Sequence[int]) -> np.ndarray:
        """The prompt, int32 [n]; `counts` are the visual tokens of each medium.

        Raises:
          ValueError: the placeholders are not those of the media.
        """
        if self.groups:
            counts = [n * config.model.group_tokens for n in self.groups]
        return text.encode_prompt(
            tokenizer,
            config.data.chat_template,
            self.turns,
            counts,
            answer_prefix=self.answer_prefix,
        )


@dataclass(frozen=True)
class Outcome:
    """What came of a question.

    Attributes:
      output: the text, without the answer prefix.
      request: None: of an item whose video cannot even be opened.
      finish: "stop": a stop token or text; "length": no more tokens were allowed; "error": a medium
        could not be read.
      finite: whether every score of the answer was.
      error: of the medium, where there is one.
      frames: that were encoded, of all media.
    """

    request: Request | None
    output: str = ""
    finish: str = "error"
    finite: bool = True
    error: str = ""
    frames: int = 0
    visual_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
