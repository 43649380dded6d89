"""A few steps of the tiny model: does everything run here?

python -m storm_jax.train --config=configs/debug.py --workdir=DIR
"""

from configs import common


def get_config(arg: str | None = None):
    size, _ = common.arguments(arg, default="tiny")
    c = common.run("debug", size)
    c.train.steps = 20
    c.train.batch = 8
    c.train.log_every = 1
    c.train.checkpoint.every = 10
    c.train.eval_samples = 16
    return c
