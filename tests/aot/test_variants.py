"""Which other meshes, policies and microbatches are offered."""

import math

from storm_jax.aot.isolated import Outcome
from storm_jax.aot.sweep import outcome_line
from storm_jax.aot.variants import (
    BATCH_AXES,
    REMAT,
    Variant,
    mesh_variants,
    remat_variants,
    smaller_variants,
)
from storm_jax.parallel.mesh import AXES
from tests.tiny import run_config


def sizes(variant: Variant) -> dict[str, int]:
    changes = dict(variant.changes)
    return {axis: changes[f"mesh.{axis}"] for axis in AXES}


def test_every_mesh_that_divides_once():
    config = run_config(**{"train.batch": 8, "train.accumulation": 2})
    meshes = [sizes(variant) for variant in mesh_variants(config, 8)]
    assert len({tuple(mesh.values()) for mesh in meshes}) == len(meshes)
    # Of all ways to write 8 as a product, those whose batch axes divide the four rows.
    expected = 0
    for code in range(4 ** len(AXES)):
        mesh = {axis: 2 ** (code // 4**i % 4) for i, axis in enumerate(AXES)}
        rows = math.prod(mesh[axis] for axis in BATCH_AXES)
        expected += math.prod(mesh.values()) == 8 and 4 % rows == 0
    assert len(meshes) == expected > 3
    shared = [math.prod(mesh[a] for a in AXES if a not in BATCH_AXES) for mesh in meshes]
    assert shared == sorted(shared)


def test_the_data_axis_of_every_mesh_goes_over_the_slices():
    config = run_config(**{"train.batch": 8})
    every = [sizes(variant) for variant in mesh_variants(config, 8)]
    sliced = [sizes(variant) for variant in mesh_variants(config, 8, slices=4)]
    assert sliced == [mesh for mesh in every if mesh["data"] in (4, 8)] != []


def test_a_variant_changes_only_what_it_names():
    config = run_config()
    variant = Variant((("mesh.fsdp", 4), ("train.remat.vit.policy", "full")))
    changed = variant.apply(config)
    assert changed.mesh.fsdp == 4 and changed.train.remat.vit.policy == "full"
    assert changed.train.remat.decoder == config.train.remat.decoder
    assert changed.model == config.model and changed.train.batch == config.train.batch
    assert str(variant) == "mesh.fsdp=4 train.remat.vit.policy=full"
    assert Variant(()).apply(config) == config and str(Variant(())) == "as it is"


def test_policies_are_those_of_the_config():
    config = run_config(**{"train.remat.decoder.policy": "dots"})
    changed = [variant.apply(config).train.remat for variant in remat_variants(config)]
    assert config.train.remat not in changed and changed[0].vit_calls
    assert [remat.vit.policy for remat in changed[1:]] == list(REMAT)
    assert all(
        remat.vit.policy == remat.temporal.policy == remat.decoder.policy for remat in changed[1:]
    )


def test_smaller_variants_keep_the_batch_and_the_devices():
    config = run_config(**{"train.batch": 64})
    mesh = {axis: 1 for axis in AXES} | {"fsdp": 8}
    variants = list(smaller_variants(config, mesh))
    assert any("train.accumulation=8" == str(variant) for variant in variants)
    for variant in variants:
        changed = variant.apply(config)
        assert changed.train.batch == 64
        if any(field.startswith("mesh") for field, _ in variant.changes):
            assert math.prod(sizes(variant).values()) == 8
            rows = changed.train.batch // changed.train.accumulation
            assert rows % math.prod(sizes(variant)[axis] for axis in BATCH_AXES) == 0


def test_a_failure_is_told():
    line = outcome_line(Outcome(Variant((("mesh.data", 3),)), None, "no such mesh"))
    assert line == "mesh.data=3: failed: no such mesh"
