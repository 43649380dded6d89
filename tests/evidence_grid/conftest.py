"""A tiny grid on real videos, shared by the tests."""

import dataclasses

import pytest

from storm_jax.evidence_grid import clips
from storm_jax.evidence_grid.grids import SMOKE
from storm_jax.evidence_grid.recipe import Point, Recipe


@pytest.fixture(scope="session")
def recipe():
    videos = dataclasses.replace(
        SMOKE.videos, families=("direction", "colour"), train=8, test=4, short_train=8
    )
    point = Point("mamba", 4, 1, 8)
    return Recipe(
        point,
        videos,
        dataclasses.replace(SMOKE.sizes, width=16, heads=2, state=4),
        dataclasses.replace(SMOKE.short, steps=2, batch=4),
        dataclasses.replace(SMOKE.reduced, steps=2, batch=4),
        dataclasses.replace(SMOKE.long[32], steps=3, batch=4),
        seeds=2,
    )


@pytest.fixture(scope="session")
def data(recipe, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("evidence") / "data")
    clips.prepare(folder, recipe.videos, 1)
    return folder
