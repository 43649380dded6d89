"""Weights in eight bits against the numbers that they stand for, in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import MeshConfig
from storm_jax.inference.engine import Engine
from storm_jax.inference.linear import apply, outputs_first, quantized
from storm_jax.inference.load import made_ready
from storm_jax.inference.sampling import Sampling
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from tests.inference.test_engine import FAMILIES, perturbed
from tests.tiny import run_config, tiny_model

# Half a step of 127 for int8; half a unit of the last of 3 bits for float8 e4m3.
LARGEST = {"int8": 0.5 / 127, "fp8": 2**-4}


@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("shape,contracted", [((24, 7), 1), ((3, 8, 10), 2), ((6, 2, 5, 3), 1)])
def test_products(kind, tokens, shape, contracted):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32) * rng.uniform(0.1, 9, shape[contracted:])
    x = rng.normal(size=(1, tokens, *shape[:contracted])).astype(np.float32)
    matrix = quantized(
        outputs_first(jnp.asarray(weight, jnp.float32), contracted), contracted, kind
    )
    assert matrix.qvalue.dtype.itemsize == 1
    inputs = tuple(range(matrix.ndim - contracted, matrix.ndim))
    stood_for = np.asarray(matrix.qvalue, np.float64) * np.asarray(matrix.scale, np.float64)
    turned = np.moveaxis(weight, range(contracted), inputs)
    largest = np.abs(turned).max(axis=inputs, keepdims=True)
    error = np.abs(stood_for - turned)
    if kind == "int8":
        assert (error <= LARGEST[kind] * largest * 1.0001).all()
    else:
        small = np.abs(turned) < largest * 2**-14  # below float8's normal numbers
        assert (error <= LARGEST[kind] * np.abs(turned) * 1.0001)[~small].all()
    with jax.default_matmul_precision("highest"):
        got = apply(jnp.asarray(x), matrix, contracted)
    expected = np.tensordot(x.astype(np.float64), stood_for, (range(2, x.ndim), inputs))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("kind", LARGEST)
def test_a_quantized_model_answers_as_its_rounded_weights_do(kind, devices):
    """The same engine with float32 matrices that hold the rounded values gives the same answer."""
    config = tiny_model(decoder=FAMILIES["qwen2"])
    run = dataclasses.replace(run_config(), model=config)
    model = StormModel(config)
    mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])

    def loaded(quantization):
        return made_ready(run, perturbed(model.init(jax.random.key(0))), mesh, quantization)

    small = loaded(kind)
    plain = loaded("")

    def widened(matrix):
        return matrix.qvalue.astype(jnp.float32) * matrix.scale

    names = ("qkv", "out", "gate_up", "down")
    weights = plain.weights._replace(
        layers=tuple(
            layer._replace(**{name: widened(getattr(layer, name)) for name in names})
            for layer in small.weights.layers
        ),
        head=widened(small.weights.head),
    )
    tokens = np.random.default_rng(1).integers(0, config.decoder.vocab_size, 9).astype(np.int32)

    def answer(model):
        engine = Engine(model, slots=1, context=64)
        engine.admit(tokens, [], Sampling(max_new_tokens=24))
        made = []
        while progress := engine.step():
            made += progress[0].tokens
        return made

    expected = answer(dataclasses.replace(plain, weights=weights))
    assert answer(small) == expected and len(set(expected)) > 2
