"""Rows split over devices along their frames and tokens, against one device."""

import jax
import numpy as np
import pytest

from storm_jax.config import MeshConfig
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.step import make_eval_step
from tests.parallel.cases import (
    assert_equal_to_one_device,
    on_one_device,
    packed_rows,
    place,
    random_params,
)
from tests.tiny import tiny_model


def model_of(**parts) -> StormModel:
    """The tiny model with one layer a part; parts as in `tiny_model`."""
    parts["decoder"] = {"layers": 1, "global_every": 1} | parts.get("decoder", {})
    parts["temporal"] = {"layers": 1} | parts.get("temporal", {})
    parts["vit"] = {"layers": 1} | parts.get("vit", {})
    return StormModel(tiny_model(**parts))


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**{"data": 1, **sizes}))


LOCAL = dict(layers=2, global_every=2, window=6)
CAPPED = dict(attention_softcap=3.0, logit_softcap=5.0, tied_embeddings=False)


def test_seq():
    """11 frames are padded to 16; 2 key-value heads and 4 query heads go over 8 devices."""
    assert_equal_to_one_device(model_of(decoder=LOCAL), mesh_of(seq=8))


def test_data_seq_tensor():
    model = model_of(reduction=dict(temporal_pool=3, spatial_pool=2), decoder=CAPPED)
    assert_equal_to_one_device(model, mesh_of(data=2, seq=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes,parts",
    [
        # One key-value head on 8 devices; a convolution that looks back past the next device;
        # each device encodes one frame at a time.
        (
            dict(seq=4, tensor=2),
            dict(
                decoder=dict(kv_heads=1, **CAPPED),
                temporal=dict(conv=16, layers=2),
                vit=dict(frames_per_call=1, layers=2),
            ),
        ),
        # 6 query heads, 2 of each key: 12 on 4 devices.
        (dict(fsdp=2, seq=4), dict(decoder=dict(heads=6, kv_heads=3, **LOCAL))),
        (dict(fsdp=4, seq=2), dict(temporal=dict(direction="forward"))),
        (dict(data=4, slices=2, seq=2), dict(reduction=dict(temporal_sampling=2))),
        # Axes alone, with the same packed rows. (CI has fsdp and tensor alone in the tests of the
        # training step and of the sharding table, and data with others.)
        *(
            pytest.param(sizes, parts, marks=pytest.mark.exhaustive)
            for sizes, parts in (
                (
                    dict(data=2, fsdp=2, seq=2),
                    dict(reduction=dict(temporal_pool=1, spatial_pool=2)),
                ),
                (dict(seq=2, tensor=4), dict(decoder=LOCAL, reduction=dict(temporal_pool=4))),
                (dict(seq=4, tensor=2), dict(temporal=dict(layers=0))),
                (dict(data=8), {}),
                (dict(data=8, slices=4), {}),
                (dict(fsdp=8), {}),
                (dict(tensor=8), dict(decoder=dict(heads=8, kv_heads=2))),
            )
        ),
    ],
)
def test_products(sizes, parts):
    assert_equal_to_one_device(model_of(**parts), mesh_of(**sizes))


def test_evaluation():
    """Scores of every position, on each device those of its rows."""
    model = model_of()
    params, batch = random_params(model), packed_rows(model)
    step = jax.jit(make_eval_step(model))
    expected = step(params, batch)
    mesh = mesh_of(data=2, seq=4)
    with jax.set_mesh(mesh):
        nll, correct = step(*place(model, params, batch, mesh))
    there = batch["targets"] >= 0
    assert nll.sharding.shard_shape(nll.shape) == (4, 48)  # as `training.evaluate` reads them
    for got, e in ((nll, expected[0]), (correct, expected[1])):
        # A small one is the difference of two numbers near 10.
        np.testing.assert_allclose(np.asarray(got)[there], np.asarray(e)[there], 1e-5, 2e-6)


@pytest.mark.slow
def test_channels_first(monkeypatch):
    """The layout of the scan on GPUs, and pieces of the loss smaller than a device's share."""
    model = model_of(temporal=dict(conv=5))
    on_one_device(model)
    monkeypatch.setattr("storm_jax.models.temporal.preferred_layout", lambda x: "bdl")
    monkeypatch.setattr("storm_jax.training.loss.CHUNK", 5)
    assert_equal_to_one_device(model, mesh_of(fsdp=2, seq=4))
