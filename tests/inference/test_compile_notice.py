"""Long compilations are announced and counted, short ones only counted."""

import time

import jax
import jax.numpy as jnp

from storm_jax.inference.compile_notice import CompileNotice


def program(n):
    """A new program each time, which XLA is busy with for a while."""

    def long_to_compile(x):
        for i in range(n):
            x = jnp.sort(jnp.cumsum(jnp.sin(x) + i, axis=0), axis=0)
        return x

    return jax.jit(long_to_compile)


def test_what_takes_long_is_announced(capfd):
    notice = CompileNotice(after=0.01)
    began = time.perf_counter()
    program(30)(jnp.ones((64, 8))).block_until_ready()
    whole = time.perf_counter() - began
    notice.close()
    lines = capfd.readouterr().err.splitlines()
    assert [x for x in lines if x.startswith("compiling long_to_compile for these sizes")]
    assert [x for x in lines if x.startswith("compiled long_to_compile in ")]
    assert 0.01 < notice.seconds <= whole


def test_what_is_short_is_counted_only(capfd):
    notice = CompileNotice(after=60.0)
    program(2)(jnp.ones((8, 8))).block_until_ready()
    seconds = notice.seconds
    assert seconds > 0
    notice.close()
    program(3)(jnp.ones((8, 8))).block_until_ready()
    assert notice.seconds == seconds  # no longer listening
    assert not capfd.readouterr().err
