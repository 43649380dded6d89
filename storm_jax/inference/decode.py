"""One token after another from a filled cache."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.inference.prefill import LoadedModel
from storm_jax.models.decoder import Cache


def sample(scores_BV: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B]: the best one at temperature 0, else a random one."""
    if temperature == 0:
        return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, scores_BV / temperature).astype(jnp.int32)


class Decode:
    """Generates from one sequence; the step is compiled once for each size of the cache."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        model = loaded.model

        @functools.partial(jax.jit, donate_argnums=2)
        def step(params, token, cache, position):
            storm = model.bind(params)
            x = storm.embed(token[:, None], None)
            positions = jnp.broadcast_to(position, x.shape[:2])
            hidden, cache = storm.decoder(x, positions, cache=cache)
            return storm.decoder.logits(hidden)[:, 0], cache

        self._step = step

    def __call__(
        self,
        scores: jax.Array,
        cache: Cache,
        position: int,
        *,
        new_tokens: int,
        stop: tuple[int, ...],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yields token ids until a stop token, which is not yielded, or `new_tokens` of them.

        Args:
          scores: of the first token, float32 [1, V].
          cache: filled up to `position`; it is used up.
          position: number of tokens in the prompt.
          temperature: 0 takes the best token each time.
          seed: of the random choices.
        """
        key = jax.random.key(seed)
        with jax.set_mesh(self._loaded.mesh):
            for index in range(new_tokens):
                token = sample(scores, temperature, jax.random.fold_in(key, index))
                scores, cache = self._step(
                    self._loaded.params, token, cache, jnp.int32(position + index)
                )
                value = int(np.asarray(token)[0])  # fetched while the next step runs
                if value in stop:
                    return
                yield value
