"""Flags of the commands that answer: what is left of a video."""

from absl import flags

from storm_jax.inference.options import Options

# See `inference.options.Options`.
_FRAMES = flags.DEFINE_integer("frames", 0, "Frames taken from a video; 0: as in training.")
_SAMPLING = flags.DEFINE_integer(
    "temporal_sampling", 0, "Keep every so many pooled frames; 0: as in training."
)
_TEMPORAL_POOL = flags.DEFINE_integer("temporal_pool", 0, "As in training, or an error.")
_SPATIAL_POOL = flags.DEFINE_integer("spatial_pool", 0, "As in training, or an error.")
_DUPLICATES = flags.DEFINE_float(
    "duplicate_threshold", 0.0, "Skip frames whose luma differs less, in levels of 255; 0: none."
)
_KEEP = flags.DEFINE_float("keep_tokens", 1.0, "Share of the visual tokens that is kept.")


def options() -> Options:
    """What is left of a video.

    Raises:
      ConfigError: a flag outside its range; the message begins with its name.
    """
    return Options(
        frames=_FRAMES.value,
        temporal_sampling=_SAMPLING.value,
        temporal_pool=_TEMPORAL_POOL.value,
        spatial_pool=_SPATIAL_POOL.value,
        duplicate_threshold=_DUPLICATES.value,
        keep_tokens=_KEEP.value,
    )
