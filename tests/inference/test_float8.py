"""Products with float8 on both sides against float64, and a model that computes with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from storm_jax.config import VISUAL, ConfigError, MeshConfig
from storm_jax.inference import float8
from storm_jax.inference.cache import empty_cache
from storm_jax.inference.engine import Engine
from storm_jax.inference.linear import (
    FEWEST_TOKENS,
    Float8Matrix,
    apply,
    outputs_first,
    quantized,
)
from storm_jax.inference.load import made_ready, replicas
from storm_jax.inference.prefill import frame_tokens
from storm_jax.inference.sampling import Sampling
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from tests.inference.test_engine import FAMILIES, perturbed
from tests.tiny import run_config, tiny_model

TOKENS = 2 * FEWEST_TOKENS


def rounding(x: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """How far off float8 may be: half a unit of 3 bits, or of the numbers below the normal ones.

    Args:
      scale: by which a number in float8 is multiplied to stand for x.
    """
    return np.maximum(2**-4 * np.abs(x), 2**-10 * scale) * 1.0001


def product_error(x, x_scale, w, w_scale) -> np.ndarray:
    """The most by which x [T, I] @ w [O, I] may be off when both are rounded."""
    largest = (np.abs(a) + rounding(a, s) for a, s in ((x, x_scale), (w, w_scale)))
    return np.matmul(next(largest), next(largest).T) - np.abs(x) @ np.abs(w).T


def relative(found, exact) -> float:
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))


@pytest.mark.parametrize("dtype,unit", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape,contracted", [((48, 7), 1), ((3, 8, 10), 2), ((40, 2, 5, 3), 1)])
def test_products_of_tokens(shape, contracted, dtype, unit):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32) * rng.uniform(0.1, 9, shape[contracted:])
    # Tokens of very different sizes, and numbers far below the largest of their token.
    x = rng.normal(size=(1, TOKENS, *shape[:contracted]))
    x *= 10 ** rng.uniform(-3, 3, TOKENS).reshape(1, -1, *[1] * contracted)
    x[:, :, 0] *= 1e-5
    x = jnp.asarray(x, dtype)
    stored = quantized(
        outputs_first(jnp.asarray(weight, jnp.float32), contracted), contracted, "fp8"
    )
    got = np.asarray(apply(x, Float8Matrix(stored), contracted), np.float64)
    inputs = int(np.prod(shape[:contracted]))
    x_TI = np.asarray(x, np.float64).reshape(TOKENS, inputs)
    w_OI = weight.reshape(inputs, -1).T.astype(np.float64)
    exact = x_TI @ w_OI.T
    x_scale = 2.0 ** -np.floor(np.log2(448 / np.abs(x_TI).max(axis=1, keepdims=True)))
    w_scale = np.abs(w_OI).max(axis=1, keepdims=True) / 448
    allowed = product_error(x_TI, x_scale, w_OI, w_scale)
    assert got.shape == (1, TOKENS, *shape[contracted:])
    off = np.abs(got.reshape(TOKENS, -1) - exact)
    assert (off <= allowed + unit * (np.abs(exact) + allowed)).all()
    # Inputs were rounded too, and what remains is mostly right.
    assert relative(got, apply(x, stored, contracted)) > 0.01
    assert relative(got, exact.reshape(got.shape)) < 2**-4


def test_a_token_does_not_depend_on_others_and_few_are_not_rounded():
    rng = np.random.default_rng(1)
    stored = quantized(jnp.asarray(rng.normal(size=(32, 48)), jnp.float32), 1, "fp8")
    matrix = Float8Matrix(stored)
    x = jnp.asarray(rng.normal(size=(1, TOKENS, 48)), jnp.float32)
    beside = x.at[:, 1].mul(1e6).at[:, 2].set(0)
    one, other = (np.asarray(apply(y, matrix, 1))[0] for y in (x, beside))
    np.testing.assert_array_equal(np.delete(one, [1, 2], 0), np.delete(other, [1, 2], 0))
    assert not other[2].any()
    few, enough = x[:, : FEWEST_TOKENS - 1], x[:, :FEWEST_TOKENS]
    np.testing.assert_array_equal(apply(few, matrix, 1), apply(few, stored, 1))
    assert relative(apply(enough, matrix, 1), apply(enough, stored, 1)) > 0.01


def test_a_score_that_is_not_finite_stays_so():
    stored = quantized(jnp.ones((32, 48), jnp.float32), 1, "fp8")
    for bad in (jnp.inf, jnp.nan):
        x = jnp.ones((TOKENS, 48), jnp.float32).at[3, 5].set(bad)
        finite = np.isfinite(apply(x, Float8Matrix(stored), 1)).all(axis=1)
        assert not finite[3] and finite.sum() == TOKENS - 1


@pytest.mark.parametrize("number", [1.0, 0.75, 448.0, 3e-20, 1e20])
def test_powers_of_two(number):
    below = float(float8.power_below(jnp.float32(number)))
    assert below <= np.float32(number) < 2 * below and np.frexp(below)[0] == 0.5


@pytest.mark.parametrize("width", [16, 1152])
def test_maps_with_one_scale(width):
    rng = np.random.default_rng(2)
    w_IO = rng.normal(size=(width, 24)) * rng.uniform(0.1, 3, 24)
    bias = rng.normal(size=24)
    scale = float8.standardised_scale(width)
    made = float8.scaled_map(jnp.float32(w_IO), jnp.float32(bias), scale, jnp.dtype(jnp.float32))
    x = rng.normal(size=(TOKENS, width))
    # As long as a standardised row can be, in the direction that the largest output takes; and
    # with all its length in one number.
    x[0] = w_IO[:, np.linalg.norm(w_IO, axis=0).argmax()]
    x[1] = np.eye(width)[3]
    x = np.float32(x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(width))
    assert np.abs(x * scale).max() <= 448 < 2 * np.sqrt(width) * scale
    got = np.asarray(made(float8.rounded(jnp.asarray(x), scale), jnp.dtype("float32")), np.float64)
    exact = x.astype(np.float64) @ np.float32(w_IO) + bias
    w_scale = float(float8.power_below(jnp.float32(448 / np.abs(w_IO).max())))
    allowed = product_error(np.float64(x), 1 / scale, np.float64(w_IO.T), 1 / w_scale)
    assert (np.abs(got - exact) <= allowed + 1e-5 * np.abs(exact).max()).all()
    assert 2**-6 < relative(got, exact) < 2**-4
    largest = float(float8.largest_output(jnp.float32(w_IO), jnp.float32(bias)))
    assert np.abs(got).max() <= largest < 2 * np.abs(got).max()


def loaded(quantization, dtype="float32", family="qwen2", devices=1):
    config = tiny_model(decoder=FAMILIES[family], dtype=dtype)
    run = dataclasses.replace(run_config(), model=config)
    mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
    params = perturbed(StormModel(config).init(jax.random.key(0)))
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return made_ready(run, jax.device_put(cast, whole), mesh, quantization)


class Case:
    """A model, a video of 16 frames and a prompt of 58 tokens."""

    def __init__(self, model):
        self.model, config = model, model.config.model
        rng = np.random.default_rng(3)
        side = config.vit.image_size
        self.video = rng.integers(0, 256, (16, side, side, 3), dtype=np.uint8)
        words = rng.integers(0, config.decoder.vocab_size, 26).astype(np.int32)
        visual = np.full(config.visual_tokens(16), VISUAL, np.int32)
        self.tokens = np.concatenate([words[:2], visual, words[2:]])
        self.empty = empty_cache(config.decoder, 1, 64, jnp.dtype(config.dtype))

    def features(self, weights, frames):
        """Traced: tokens of every frame alone."""
        return frame_tokens(self.model.model.bind(weights.encoder), weights, frames)

    def first(self, weights, visual):
        """Traced: scores of the first token, [1, V]."""
        prefill, n = self.model.decoder.prefill, len(self.tokens)
        return prefill(weights, self.empty, 0, self.tokens, n, visual)[0]

    def __call__(self, function, *arguments):
        with jax.set_mesh(self.model.mesh):
            return jax.jit(function)(self.model.weights, *arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_with_it(family, dtype):
    exact, small = (Case(loaded(kind, dtype, family)) for kind in ("", "fp8_dynamic"))
    # Six products a layer, each off by some 2**-5 of its result.
    off = relative(*(case(case.features, case.video) for case in (small, exact)))
    assert 2**-6 < off < 2**-3
    engine = Engine(small.model, slots=1, context=64)
    media = engine.encode(small.video)
    p, q = (jax.nn.log_softmax(case(case.first, media.tokens)[0]) for case in (exact, small))
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    assert 0 < (np.exp(p) * (p - q)).sum() < 0.1
    slot = engine.admit(small.tokens, [media], Sampling(max_new_tokens=5))
    made, finite = [], True
    while progress := engine.step():
        made += progress[0].tokens
        finite &= progress[0].finite
    engine.release(slot)
    assert made[0] == q.argmax() and len(made) == 5 and finite


def dots(jaxpr):
    """All products of a traced function."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner)


def float8_products(function, *arguments) -> int:
    """How many there are; each is of the form that is one cuBLASLt call."""
    count = 0
    for dot in dots(jax.make_jaxpr(function)(*arguments).jaxpr):
        operands = [x.aval for x in dot.invars]
        if any(x.dtype.itemsize == 1 for x in operands):
            count += 1
            assert [x.dtype for x in operands] == [float8.DTYPE] * 2
            assert [x.ndim for x in operands] == [2, 2]
            assert dot.params["dimension_numbers"] == (((1,), (1,)), ((), ()))
    return count


def test_which_products_it_takes():
    case = Case(loaded("fp8_dynamic", "bfloat16"))
    weights, config = case.model.weights, case.model.config.model
    visual = jnp.zeros((64, config.decoder.width), config.dtype)
    with jax.set_mesh(case.model.mesh):
        # Of the last layer only queries, keys and values are computed for all tokens.
        found = float8_products(case.first, weights, visual)
        assert found == 4 * (config.decoder.layers - 1) + 1
        assert float8_products(case.features, weights, case.video) == 6 * len(weights.vit)


def test_copies_on_other_devices_compute_the_same():
    model = loaded("fp8_dynamic")
    (copy,) = replicas(model, [jax.devices()[1:2]])
    one, other = (Case(m) for m in (model, copy))
    one, other = (case(case.features, case.video) for case in (one, other))
    assert other.devices() == {jax.devices()[1]}
    np.testing.assert_array_equal(one, other)


def test_unknown_kinds_and_several_devices_are_refused():
    with pytest.raises(ConfigError, match="quantization='fp4' is not known: take one of '', 'int8"):
        loaded("fp4")
    with pytest.raises(ConfigError, match="fp8_dynamic is for one device, but the model is on 2"):
        loaded("fp8_dynamic", devices=2)
