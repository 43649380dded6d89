"""Tokens of a row alone, through the kernel for one token in the emulator, and without it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import MeshConfig
from storm_jax.inference.cache import empty_cache
from storm_jax.inference.decoder import CachedDecoder
from storm_jax.inference.load import made_ready
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_kernels.matvec import gpu
from tests.inference.test_engine import FAMILIES, perturbed
from tests.kernels.gpu_emulation import emulated_gpu, recorded_launches  # noqa: F401
from tests.tiny import run_config, tiny_model

pytest.importorskip("triton")

exhaustive = (pytest.mark.slow, pytest.mark.exhaustive)
TOKENS = np.array([5, 1, 7, 2, 40, 33, 8, 21], np.int32)


class Case:
    """A decoder with its weights; bfloat16, or float32 with the same numbers."""

    def __init__(self, family, quantization="", dtype="bfloat16", devices=1, rows=1, **decoder):
        config = tiny_model(decoder={**FAMILIES[family], **decoder})
        params = perturbed(StormModel(config).init(jax.random.key(0)))
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), params)
        self.config = dataclasses.replace(config, dtype=dtype)
        run = dataclasses.replace(run_config(), model=self.config)
        self.mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
        self.weights = made_ready(run, params, self.mesh, quantization).weights
        self.rows = rows

    def scores(self, trace=False):
        """Behind each token from the fourth on: the first three are a prompt, others decoded."""
        dtype = jnp.dtype(self.config.dtype)
        decoder = CachedDecoder(self.config.decoder, dtype)
        many = (self.rows,)

        def run(weights):
            cache = empty_cache(self.config.decoder, self.rows, 8, dtype)
            for row in range(self.rows):
                _, cache = decoder.prefill(
                    weights, cache, jnp.int32(row), jnp.asarray(TOKENS[:3]), jnp.int32(3), None
                )
            found = []
            for place in range(3, len(TOKENS)):
                tokens = jnp.full(many, TOKENS[place])
                wanted = jnp.ones(many, bool)
                scores, cache = decoder.token(weights, cache, tokens, jnp.full(many, place), wanted)
                found.append(scores[0])
            return jnp.stack(found)

        with jax.set_mesh(self.mesh):
            call = jax.jit(run)
            return call.trace(self.weights) if trace else np.asarray(call(self.weights), np.float64)


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda float8: None)


def off(found, exact):
    return np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("qwen2", "int8"),
        ("gemma3", ""),
        pytest.param("qwen2", "", marks=exhaustive),
        pytest.param("qwen2", "fp8", marks=exhaustive),
        pytest.param("gemma2", "int8", marks=exhaustive),
    ],
)
def test_the_kernel_changes_nothing_but_roundings(family, quantization, emulated_gpu, request):  # noqa: F811
    exact = Case(family, quantization, "float32").scores()
    plain = Case(family, quantization).scores()
    request.getfixturevalue("served")
    fused = Case(family, quantization).scores()
    assert (fused != plain).any()
    assert off(fused, exact) < 1.5 * off(plain, exact)
    assert off(plain, exact) < 0.1


@pytest.mark.usefixtures("served")
def test_where_it_is_taken():
    """In a layer four products, and the scores; the last layer and the scores of a prompt too."""

    def launches(*args, **given):
        with recorded_launches() as found:
            Case(*args, **given).scores(trace=True)
        return [launch for launch in found if launch.name == "matvec_kernel"]

    found = launches("qwen2")
    # Of the prompt's last layer queries, keys and values are of all tokens.
    assert len(found) == 3 + 1 + 5 * (2 * 4 + 1)
    # Of two rows no token is decoded by it; what is left are two prompts.
    assert len(launches("qwen2", rows=2)) == 2 * (3 + 1)
    assert not launches("qwen2", dtype="float32")
    assert not launches("qwen2", devices=2)
