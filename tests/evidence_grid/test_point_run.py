"""Several seeds at once against the project's own step, one seed at a time."""

import dataclasses

import jax
import numpy as np
import pytest

from storm_jax.config import MeshConfig
from storm_jax.evidence_grid import seeds
from storm_jax.evidence_grid.point_run import PointRun
from storm_jax.evidence_grid.recipe import EvidenceError, described, train_config
from storm_jax.evidence_grid.results import Folder
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.optim import make_optimizer, trainable_parts
from storm_jax.training.state import init_state
from storm_jax.training.step import make_eval_step, make_train_step


@pytest.fixture(scope="module")
def run(recipe, data, tmp_path_factory):
    return PointRun(recipe, data, str(tmp_path_factory.mktemp("work")), lambda _: None)


def test_seeds_at_once_are_seeds_one_by_one(run):
    """Parameters of seed 1 after both of them trained side by side, and its answers."""
    stage = run.recipe.long
    config = train_config(stage, 1)
    part = run.long("train")
    rows = run.rows(part, run.config, run.length(part))
    order = run.order(2, len(part.tasks))
    state = seeds.start(config, seeds.init_params(run.model, 2))
    state, metrics = seeds.make_train_chunk(run.model, config)(state, rows, order)

    optimizer = make_optimizer(config.optimizer, config.steps)
    parts = trainable_parts(config.optimizer)
    one_device = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    alone = init_state(run.model, optimizer, parts, one_device, seed=1)
    alone = jax.tree.map(np.asarray, alone)
    step = jax.jit(make_train_step(run.model, optimizer, config))
    losses = []
    for index in order[:, 1]:
        alone, found = step(alone, {name: x[index] for name, x in rows.items()})
        losses.append(float(found["loss"]))
    np.testing.assert_allclose(metrics["loss"][:, 1], losses, rtol=2e-5)
    for many, one in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        # Adam divides by the root of tiny second moments.
        np.testing.assert_allclose(many[1], one, rtol=1e-3, atol=2e-4)

    score = seeds.make_score(run.model)
    right = seeds.scored(score, state.params, rows, 4)
    params = jax.tree.map(lambda x: x[1], state.params)
    _, correct = jax.jit(make_eval_step(run.model))(params, rows)
    there = np.asarray(rows["targets"]) >= 0
    np.testing.assert_array_equal(right[1], (np.asarray(correct) | ~there).all(1))


def test_seeds_differ_in_parameters_and_order(run):
    table = seeds.init_params(run.model, 2)["decoder"]["embedding"]["table"]
    assert (table[0] != table[1]).all()
    order = run.order(0, 8)
    assert order.shape == (2, 2, 4)
    assert sorted(order[:, 0].ravel()) == list(range(8))  # an epoch
    assert (order[:, 0] != order[:, 1]).any()


@pytest.mark.exhaustive  # `test_same_training` compares a point with the command
@pytest.mark.slow
def test_points_share_stages_and_leave_results(recipe, data, tmp_path):
    more = dataclasses.replace(recipe, point=dataclasses.replace(recipe.point, frames=16))
    said, found = [], {}
    for one in (recipe, more):
        name = one.point.name
        found[name] = PointRun(
            one, data, str(tmp_path), lambda text, name=name: said.append((name, text))
        ).result()
    one, two = found.values()
    assert one["curves"][:2] == two["curves"][:2] and len(two["curves"]) == 3
    for stage in (1, 2):
        who = [name for name, text in said if text.startswith(f"stage {stage}")]
        assert set(who) == {"mamba_t4_s1_f8"}  # the other point reads what it left
    assert one["train_step_ms"]["low"] <= one["train_step_ms"]["ms"]
    # 8 frames of 2 x 2 tokens: two pooled frames, one of which temporal sampling keeps.
    tokens = [found["answers"][n]["visual_tokens"] for found in (one,) for n in one["answers"]]
    assert tokens == [8, 8, 4, 4]
    folder = Folder(str(tmp_path))
    for name, result in found.items():
        folder.write(name, result)
    assert folder.has(recipe) and folder.has(more)
    read = folder.read()["mamba_t4_s1_f16"].answers("test", 2)
    assert read.right.shape == (2, 8)
    with pytest.raises(EvidenceError, match="long.rate is 0.001, not 0.002"):
        folder.has(dataclasses.replace(recipe, long=dataclasses.replace(recipe.long, rate=2e-3)))
    assert described(recipe)["point"]["frames"] == 8
