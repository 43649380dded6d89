"""Meshes that a model or its data cannot be split over are refused before anything is compiled."""

import jax
import pytest

from storm_jax.config import ConfigError, MeshConfig
from storm_jax.parallel.checks import check_divisible
from storm_jax.parallel.mesh import AXES
from tests.tiny import run_config

WIDE = {
    "model.decoder.heads": 8,
    "model.decoder.kv_heads": 2,
    "data.row_frames": 64,
    "data.sequence_length": 96,
}


def mesh_of(**sizes):
    mesh = MeshConfig(**({"data": 1} | sizes))
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    return jax.sharding.AbstractMesh(shape, AXES)


@pytest.mark.parametrize(
    "overrides,sizes,message",
    [
        (
            {},
            dict(tensor=16),
            r"model.decoder.heads=8 .* mesh.tensor=16: .* set mesh.tensor to 8 or",
        ),
        ({"model.decoder.mlp": 132}, dict(tensor=8), r"model.decoder.mlp=132 .* mesh.tensor to 4 "),
        (
            {"model.decoder.vocab_size": 511},
            dict(tensor=2),
            "model.decoder.vocab_size=511 .* to 1 ",
        ),
        (
            {"model.decoder.width": 12, "model.temporal.expand": 3},
            dict(tensor=8),
            r"model.temporal.expand \* model.decoder.width=36 .* mesh.tensor to 4 ",
        ),
        ({"data.sequence_length": 90}, dict(seq=4), "data.sequence_length=90 .* mesh.seq to 2 "),
        (
            {"model.vit.width": 72},
            dict(fsdp=8, seq=2),
            r"model.vit.width=72 .* mesh.fsdp \* mesh.seq=16: .* product 8, and mesh.data 2 times",
        ),
        ({"model.decoder.width": 72}, dict(fsdp=16), "model.decoder.width=72 .* the product 8"),
        ({"data.row_frames": 17}, dict(seq=16), "data.row_frames=17 would be padded to 32 for"),
        (
            {"model.decoder.heads": 6},
            dict(seq=8, tensor=2),
            r"model.decoder.heads=6 would be padded to 16 for mesh.tensor \* mesh.seq=16",
        ),
    ],
)
def test_what_an_axis_does_not_divide_is_named_with_the_remedy(overrides, sizes, message):
    config = run_config(**WIDE | overrides)
    check_divisible(config, mesh_of())  # one device: nothing to divide
    with pytest.raises(ConfigError, match=message):
        check_divisible(config, mesh_of(**sizes))


@pytest.mark.parametrize(
    "overrides,sizes",
    [
        ({}, dict(data=3, tensor=8, seq=1)),  # key-value heads are repeated
        ({"model.decoder.heads": 6}, dict(seq=8)),  # 6 heads are 8 with padding
        ({"data.row_frames": 63}, dict(seq=4)),
        ({"model.vit.heads": 1, "model.vit.mlp": 33}, dict(tensor=8)),
        (
            {"model.temporal.layers": 0, "model.decoder.width": 36, "model.temporal.expand": 1},
            dict(tensor=8),
        ),
    ],
)
def test_what_costs_little_is_accepted(overrides, sizes):
    check_divisible(run_config(**WIDE | overrides), mesh_of(**sizes))
