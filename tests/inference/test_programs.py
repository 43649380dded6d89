"""Programs that are compiled beside what runs."""

import threading

import jax
import jax.numpy as jnp
import pytest

from storm_jax.config import MeshConfig
from storm_jax.inference.programs import CompileError, Family, Programs
from storm_jax.parallel.mesh import make_mesh


@pytest.fixture
def programs():
    return Programs(make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def doubling(programs, gate=None, traced=None, begun=None):
    """A family of functions, which are traced only when `gate` is open."""

    @jax.jit
    def function(x):
        if begun is not None:
            begun.set()
        if gate is not None:
            assert gate.wait(30)
        if traced is not None:
            traced.append(x.shape)
        return 2 * x

    return Family(programs, "doubling", function, lambda n: (jax.ShapeDtypeStruct((n,), "int32"),))


def test_compiled_once_for_each_size(programs):
    traced = []
    family = doubling(programs, traced=traced)
    for n in (3, 4, 3, 4):
        assert family(n)(jnp.arange(n, dtype=jnp.int32)).tolist() == [2 * i for i in range(n)]
    assert traced == [(3,), (4,)] and len(programs) == 2


def test_beside(programs):
    gate, told, traced = threading.Event(), [], []
    programs.told = lambda name, seconds: told.append(name)
    family = doubling(programs, gate, traced)
    assert not family.ahead(3) and not family.ahead(4) and not family.ahead(3)
    assert not told
    gate.set()
    programs.wait()
    assert family.ahead(3) and family.ahead(4)
    assert told == ["doubling"] * 2 and traced == [(3,), (4,)]
    assert family(3)(jnp.ones(3, jnp.int32)).tolist() == [2] * 3
    assert not family.ahead(5)  # the thread that had ended begins again
    programs.wait()
    assert family.ahead(5)


def test_waiting_for_what_is_being_compiled(programs):
    gate, traced, got = threading.Event(), [], []
    family = doubling(programs, gate, traced)
    family.ahead(3)
    waiting = threading.Thread(target=lambda: got.append(family(3)))
    waiting.start()
    gate.set()
    waiting.join(30)
    assert got[0](jnp.ones(3, jnp.int32)).tolist() == [2] * 3 and traced == [(3,)]


def test_a_program_that_fails(programs):
    """Whoever asks is told, and the next one has it tried again."""
    fails = [True]

    @jax.jit
    def function(x):
        if fails:
            raise ValueError("RESOURCE_EXHAUSTED")
        return x + 1

    family = Family(programs, "one more", function, lambda: (jax.ShapeDtypeStruct((), "int32"),))
    assert not family.ahead()
    programs.wait()
    assert family.ahead()
    with pytest.raises(CompileError, match="one more .*RESOURCE_EXHAUSTED"):
        family()
    with pytest.raises(CompileError):
        family()
    assert not family.ahead()
    programs.wait()
    with pytest.raises(CompileError, match="one more .*RESOURCE_EXHAUSTED"):
        programs.check()
    fails.clear()
    assert family()(jnp.int32(1)) == 2
    programs.check()


def test_what_is_given_up(programs):
    gate, begun = threading.Event(), threading.Event()
    family = doubling(programs, gate, begun=begun)
    for n in (3, 4, 5):
        assert not family.ahead(n)
    assert begun.wait(30)
    programs.give_up()
    gate.set()
    programs.wait()
    assert len(programs) == 1 and family.ahead(3)
    assert family(4)(jnp.ones(4, jnp.int32)).tolist() == [2] * 4
