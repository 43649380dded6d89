"""A small model with random numbers and packed rows, on one device and on a mesh."""

import functools

import jax
import numpy as np
import pytest

from storm_jax.config import VISUAL
from storm_jax.data.packing import Limits, RowBuilder, Sample
from storm_jax.data.text import Encoded
from storm_jax.models.storm import StormModel
from storm_jax.parallel import sharding
from storm_jax.training.loss import loss_sums


def random_params(model: StormModel):
    """Random numbers of a fixed size for every parameter, so that none is neutral."""
    leaves, tree = jax.tree.flatten(model.abstract())
    rng = np.random.default_rng(0)
    values = [(0.3 * rng.normal(size=x.shape)).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, values)


# Frames of each medium of each sample; a sample without media is text alone. Two rows on each of
# four devices: with eleven frames and temporal pooling by two, hardly any medium or group ends
# where a device's frames end.
ROWS = (
    ((5, 1), (3,), ()),
    ((1, 1, 1), (), (7,)),
    ((11,),),
    ((), ()),
)
FRAMES, LENGTH = 11, 48


def packed_rows(model: StormModel, copies: int = 2) -> dict[str, np.ndarray]:
    """`copies` of `ROWS` with their own random pixels and tokens."""
    rng = np.random.default_rng(1)
    config, rows = model.config, []
    for samples in ROWS * copies:
        builder = RowBuilder(config, Limits(LENGTH, FRAMES))
        for media in samples:
            builder.add(_sample(config, media, rng))
        rows.append(builder.row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _sample(config, media, rng):
    text = rng.integers(1, config.decoder.vocab_size, 6).astype(np.int32)
    tokens = np.insert(text, rng.integers(0, 4, len(media)), VISUAL)
    loss = (np.arange(len(tokens)) >= len(tokens) - 3) & (tokens != VISUAL)
    side = config.vit.image_size
    frames = tuple(rng.integers(0, 256, (f, side, side, 3), np.uint8) for f in media)
    return Sample(Encoded(tokens, loss), frames)


def objective(model: StormModel, params, batch):
    """What training minimises: the sums over answer tokens, per answer token."""
    storm = model.bind(params)
    sums = loss_sums(storm.decoder, storm(batch), batch["targets"])
    return (sums.nll + 0.1 * sums.z) / sums.tokens


def place(model: StormModel, params, batch, mesh):
    params = jax.tree.map(
        lambda x, axes: jax.device_put(x, sharding.named(axes, x.shape, mesh)),
        params,
        model.axes(),
    )
    batch = {k: jax.device_put(x, sharding.of_batch(k, x.shape, mesh)) for k, x in batch.items()}
    return params, batch


@functools.cache
def on_one_device(model: StormModel):
    step = jax.jit(jax.value_and_grad(functools.partial(objective, model)))
    return step(random_params(model), packed_rows(model))


def assert_equal_to_one_device(model: StormModel, mesh, tolerance: float = 1e-5):
    """Loss and gradients of every parameter, which lie where the parameter lies."""
    expected_loss, expected = on_one_device(model)
    with jax.set_mesh(mesh):
        placed, batch = place(model, random_params(model), packed_rows(model), mesh)
        step = jax.jit(jax.value_and_grad(functools.partial(objective, model)))
        got_loss, got = step(placed, batch)
    assert float(got_loss) == pytest.approx(float(expected_loss), rel=tolerance)
    leaves = jax.tree_util.tree_leaves_with_path(got)
    others = jax.tree.leaves(expected), jax.tree.leaves(placed)
    for (path, g), e, p in zip(leaves, *others, strict=True):
        name = jax.tree_util.keystr(path)
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim), name
        g, e = np.asarray(g), np.asarray(e)
        if "vit" in name and "key" in name and "bias" in name:
            continue  # zero but for rounding
        assert np.linalg.norm(e) > 0, name
        error = np.linalg.norm(g - e) / np.linalg.norm(e)
        assert error < tolerance, (name, error)
