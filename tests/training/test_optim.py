"""The optimizer against PyTorch's AdamW, and the schedule against hand-computed values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from storm_jax.config import ConfigError, MeshConfig, OptimizerConfig, PartRates
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.optim import (
    make_optimizer,
    schedule,
    split_parts,
    trainable_parts,
    update,
)

CONFIG = OptimizerConfig(
    rates=PartRates(vit=0.0, projector=1e-2, temporal=3e-2, decoder=1e-3),
    warmup_fraction=0.5,
    final_fraction=0.1,
    weight_decay=0.1,
    clip_norm=0.0,
)


def params():
    rng = np.random.default_rng(0)
    return {
        "vit": {"weight": jnp.ones((2, 2))},
        "projector": {"weight": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)},
        "temporal": {
            "weight": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
            "A_log": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
        },
        "decoder": {"table": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)},
    }


def test_schedule_by_hand():
    rate = schedule(CONFIG, steps=8)  # 4 steps of warm-up from 1/4, then a cosine down to 0.1
    expected = [0.25, 0.4375, 0.625, 0.8125]
    expected += [0.1 + 0.9 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    np.testing.assert_allclose([rate(i) for i in range(8)], expected, rtol=1e-6)


def test_equals_torch_adamw_part_by_part():
    torch = pytest.importorskip("torch")
    steps, trained = 6, split_parts(params(), trainable_parts(CONFIG))[0]
    optimizer = make_optimizer(CONFIG, steps)
    state = optimizer.init(trained)

    leaves, tree = jax.tree_util.tree_flatten_with_path(trained)
    theirs = [torch.nn.Parameter(torch.tensor(np.array(x))) for _, x in leaves]
    groups = []
    for (path, _), p in zip(leaves, theirs, strict=True):
        decay = 0.1 if path[-1].key != "A_log" else 0.0
        groups.append(
            {"params": [p], "lr": getattr(CONFIG.rates, path[0].key), "weight_decay": decay}
        )
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    peaks = [g["lr"] for g in adamw.param_groups]

    rng = np.random.default_rng(1)
    for step in range(steps):
        grads = [rng.normal(size=x.shape).astype(np.float32) for _, x in leaves]
        updates, state = optimizer.update(jax.tree.unflatten(tree, grads), state, trained)
        trained = optax.apply_updates(trained, updates)
        factor = float(schedule(CONFIG, steps)(step))
        for p, g, group, peak in zip(theirs, grads, adamw.param_groups, peaks, strict=True):
            p.grad, group["lr"] = torch.tensor(g), peak * factor
        adamw.step()
    for ours, p in zip(jax.tree.leaves(trained), theirs, strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), atol=2e-6)


def test_clipping_uses_the_norm_of_all_trained_parts():
    config = dataclasses.replace(CONFIG, clip_norm=1.0, beta1=0.0, beta2=0.0, weight_decay=0.0)
    trained = split_parts(params(), trainable_parts(config))[0]
    optimizer = make_optimizer(dataclasses.replace(config, eps=1e3), steps=2)
    grads = jax.tree.map(lambda x: 10 * jnp.ones_like(x), trained)
    updates, _ = optimizer.update(grads, optimizer.init(trained), trained)
    norm = np.sqrt(sum(x.size for x in jax.tree.leaves(trained)) * 100)
    # With eps far above the gradients, Adam's step is gradient / eps.
    expected = -1e-2 * (10 / norm) / 1e3
    np.testing.assert_allclose(updates["projector"]["weight"], expected, rtol=1e-3)


def test_frozen_parts_have_no_state():
    parts = trainable_parts(CONFIG)
    assert parts == ("projector", "temporal", "decoder")
    trained, frozen = split_parts(params(), parts)
    assert set(frozen) == {"vit"}
    moments = jax.tree.leaves(make_optimizer(CONFIG, 1).init(trained))
    sizes = sum(x.size for x in jax.tree.leaves(trained))
    assert sum(x.size for x in moments if x.ndim) == 2 * sizes


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="nothing would be trained"):
        trainable_parts(OptimizerConfig(rates=PartRates(0.0, 0.0, 0.0, 0.0)))


def test_adafactor_on_a_mesh_equals_optax_alone_and_keeps_its_layout():
    """Both axes of the matrix are split, and its state is sums over each of them."""
    config = dataclasses.replace(CONFIG, kind="adafactor", warmup_fraction=0.0, weight_decay=0.0)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(256, 128)).astype(np.float32)
    grads = [rng.normal(size=weight.shape).astype(np.float32) for _ in range(3)]
    rates = schedule(config, 3)
    alone = optax.adafactor(
        lambda step: 1e-3 * rates(step), multiply_by_parameter_scale=False, clipping_threshold=1.0
    )
    expected, state = weight, alone.init(weight)
    for grad in grads:
        updates, state = alone.update(grad, state, expected)
        expected = optax.apply_updates(expected, updates)

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    optimizer = make_optimizer(config, 3)
    layout = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        tree = {"decoder": {"weight": jax.device_put(weight, layout)}}
        state = jax.jit(optimizer.init)(tree)
        layouts = jax.tree.map(lambda x: x.sharding.spec, state)
        step = jax.jit(lambda g, s, p: update(optimizer, g, s, p))
        for grad in grads:
            updates, state = step(
                {"decoder": {"weight": jax.device_put(grad, layout)}}, state, tree
            )
            tree = optax.apply_updates(tree, updates)
            assert jax.tree.map(lambda x: x.sharding.spec, state) == layouts
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert max(sizes) == 256  # a row or a column, never the matrix
    np.testing.assert_allclose(tree["decoder"]["weight"], expected, rtol=1e-6, atol=1e-7)


def test_first_moment_in_bfloat16():
    config = dataclasses.replace(CONFIG, first_moment="bfloat16")
    trained = split_parts(params(), trainable_parts(config))[0]
    dtypes = {x.dtype.name for x in jax.tree.leaves(make_optimizer(config, 4).init(trained))}
    assert dtypes == {"bfloat16", "float32", "int32"}
