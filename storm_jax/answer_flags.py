"""Flags of the commands that answer: how tokens are chosen."""

from absl import flags

from storm_jax.inference.sampling import Sampling

# See `inference.sampling.Sampling`.
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 always takes the best token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Choose among so many best tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Choose among the best that add to this probability.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Least probability, as a share of the best token's.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Of tokens that are there; 1: none.")
_SEED = flags.DEFINE_integer("seed", 0, "Of random choices.")
STOP = flags.DEFINE_multi_string("stop", [], "An answer ends before this text.")


def sampling(stop_tokens: tuple[int, ...] = ()) -> Sampling:
    """What decoding may do.

    Raises:
      ValueError: a flag outside its range; the message begins with its name.
    """
    return Sampling(
        max_new_tokens=NEW_TOKENS.value,
        repetition_penalty=_PENALTY.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        seed=_SEED.value,
        stop_tokens=stop_tokens,
    )
