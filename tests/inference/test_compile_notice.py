"""Long compilations are announced and counted, short ones only counted."""

import random
import time

import jax
import jax.numpy as jnp

from storm_jax.config import MeshConfig
from storm_jax.inference.compile_notice import CompileNotice
from storm_jax.inference.programs import Family, Programs
from storm_jax.parallel.mesh import make_mesh


def program(n):
    """A program that no cache on disk has, and that XLA is busy with for a while."""
    new = random.SystemRandom().random()

    def long_to_compile(x):
        x = x + new
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


def test_what_is_compiled_beside_counts_where_it_is_waited_for(capfd):
    programs = Programs(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    arguments = (jax.ShapeDtypeStruct((64, 8), "float32"),)
    first, second = (
        Family(programs, name, program(30), lambda: arguments) for name in ("first", "second")
    )
    notice = CompileNotice(after=0.01)
    first.ahead()
    programs.wait()
    assert notice.seconds == 0
    assert "compiling long_to_compile for these sizes" in capfd.readouterr().err
    second.ahead()
    began = time.perf_counter()
    second()
    waited = time.perf_counter() - began
    notice.close()
    assert 0 < notice.seconds <= waited
