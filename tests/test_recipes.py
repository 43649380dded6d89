"""Every recipe on every cluster that it offers: a configuration whose mesh, batch and model fit."""

import json

import jax
import pytest

from configs import align, clusters, hour, long, sft
from storm_jax.config import RunConfig, from_mapping
from storm_jax.parallel.checks import check_divisible

SIZES = ("gemma3_4b", "gemma2_9b", "qwen2_7b")


def run_config(recipe, argument: str) -> RunConfig:
    return from_mapping(RunConfig, json.loads(recipe.get_config(argument).to_json_best_effort()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cluster", clusters.CLUSTERS)
@pytest.mark.parametrize("recipe", [align, sft, long, hour], ids=lambda r: r.__name__)
def test_recipes_fit_their_clusters(recipe, cluster, size):
    devices = clusters.CLUSTERS[cluster][0]
    if recipe is hour and devices < 16 and size != "gemma3_4b":
        with pytest.raises(ValueError, match="devices, h200_8 has fewer"):
            recipe.get_config(f"size={size},cluster={cluster}")
        return
    config = run_config(recipe, f"size={size},cluster={cluster}")
    mesh = config.mesh
    assert mesh.data * mesh.fsdp * mesh.seq * mesh.tensor == devices
    rows = config.train.batch // config.train.accumulation
    assert rows % (mesh.data * mesh.fsdp) == 0
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "seq", "tensor")}
    check_divisible(config, jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)))
