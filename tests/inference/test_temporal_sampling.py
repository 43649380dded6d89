"""Sampling after encoding against the model's reduction, which samples while it pools."""

import numpy as np
import pytest

from storm_jax.config import ReductionConfig
from storm_jax.inference.prefill import Visual, bucket
from storm_jax.inference.temporal_sampling import sampled
from storm_jax.models.reduction import reduce_tokens


@pytest.mark.parametrize(("base", "every", "frames"), [(1, 3, 15), (2, 2, 15), (1, 2, 1)])
def test_equal_to_the_reduction_of_the_model(base, every, frames):
    N, D = 4, 3
    x_BFND = np.random.default_rng(0).normal(size=(1, frames, N, D)).astype(np.float32)

    def reduced(sampling):
        config = ReductionConfig(temporal_pool=2, temporal_sampling=sampling)
        groups = config.groups(frames)
        room = bucket(groups, 4)  # as Encoder has it
        tokens = reduce_tokens(x_BFND, config.frame_groups(frames)[None], room, 1)[0]
        return Visual(tokens, groups * N, frames, frames * N)

    found, wanted = sampled(reduced(base), N, every), reduced(base * every)
    assert (found.count, found.frames, found.mixed) == (wanted.count, frames, frames * N)
    # The same number of rows too, so that the decoder's program is the same.
    assert found.tokens.shape == wanted.tokens.shape
    np.testing.assert_array_equal(found.tokens[: found.count], wanted.tokens[: found.count])
