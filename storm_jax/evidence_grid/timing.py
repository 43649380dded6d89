"""What a grid point costs: measured alone on the device, after training."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.evidence_grid import seeds
from storm_jax.evidence_grid.point_run import PointRun, sampled
from storm_jax.evidence_grid.recipe import SAMPLING, SPLITS, described, train_config
from storm_jax.models.storm import Params, StormModel
from storm_jax.training.step import make_eval_step

_REPEATS = 5
_STEPS = 10  # training steps of one measurement
_INFERENCE = 32  # clips in a batch
_BATCHES = 10  # of one measurement


def measure(run: PointRun) -> dict[str, object]:
    """Times of the second stage's training step and of answering, one seed, in milliseconds.

    Steps of one seed run back to back inside one program, so that launching from Python does not
    count. Each number is the median of `_REPEATS`, with the smallest and the largest.
    """
    part = run.long(SPLITS[0])
    frames = jax.device_put(np.asarray(part.frames))
    params = seeds.init_params(run.model, 1)
    stage = run.recipe.long
    on_device = run.rows(part, run.config, frames)
    config = train_config(stage, 0)
    chunk = seeds.make_train_chunk(run.model, config)
    order = seeds.order(len(part.tasks), 1, 0, _STEPS, stage.batch)[:, None]
    state = [seeds.start(config, params)]

    def train():
        state[0], metrics = chunk(state[0], on_device, order)
        jax.block_until_ready(metrics)

    found = {"train_step_ms": _timed(train, _STEPS), "train_batch": stage.batch}
    one = jax.tree.map(lambda x: x[0], params)
    for sampling in (1, SAMPLING):
        answer = _answer(run, part, frames, one, sampling)
        name = "inference_ms" if sampling == 1 else "inference_sampled_ms"
        found[name] = _timed(answer, _BATCHES * _INFERENCE)
    return {
        "recipe": described(run.recipe),
        **found,
        "inference_batch": _INFERENCE,
        "device": jax.devices()[0].device_kind,
    }


def _answer(run: PointRun, part, frames: jax.Array, params: Params, sampling: int) -> Callable:
    """Scores `_BATCHES` batches: ViT, temporal encoder, reduction, and the decoder's prefill."""

    config = sampled(run.config, sampling)
    on_device = run.rows(part, config, frames)
    step = make_eval_step(StormModel(config))
    index = np.resize(np.arange(len(part.tasks), dtype=np.int32), (_BATCHES, _INFERENCE))

    @jax.jit
    def answer(params: Params, on_device, index: jax.Array):
        def one(index_B: jax.Array) -> jax.Array:
            return step(params, {name: x[index_B] for name, x in on_device.items()})[1]

        return jax.lax.map(one, index)

    return lambda: jax.block_until_ready(answer(params, on_device, jnp.asarray(index)))


def _timed(call: Callable[[], object], parts: int) -> dict[str, float]:
    """Milliseconds of one of the `parts` that a call consists of."""
    call()  # compiles
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began) / parts)
    low, high = min(times), max(times)
    return {"ms": round(float(np.median(times)), 4), "low": round(low, 4), "high": round(high, 4)}
