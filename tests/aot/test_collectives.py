"""Collective bytes of small compiled programs against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from storm_jax.aot import hlo
from storm_jax.aot.between_slices import transfer
from storm_jax.aot.collectives import collectives, table
from storm_jax.aot.replica_groups import replica_groups
from storm_jax.config import ConfigError
from tests.aot.compiled import mesh, program

# A device's operand is [8, 16] float32 in all of these.
V = 8 * 16 * 4


def only(found):
    [collective] = found
    return collective


def exchange(kind, axis):
    return {
        "all-gather": lambda x: jax.lax.all_gather(x, axis),
        "all-reduce": lambda x: jax.lax.psum(x, axis),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(x, axis, tiled=True),
        "all-to-all": lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
    }[kind]


@pytest.mark.parametrize("axis,n", [("a", 2), ("b", 4), (("a", "b"), 8)])
@pytest.mark.parametrize(
    "kind,received",
    [
        ("all-gather", lambda n: V * (n - 1)),
        ("all-reduce", lambda n: 2 * V * (n - 1) / n),
        ("reduce-scatter", lambda n: V * (n - 1) / n),
        ("all-to-all", lambda n: V * (n - 1) / n),
    ],
)
def test_each_kind_along_each_axis(kind, received, axis, n):
    m = mesh(a=2, b=4)
    compiled = program(exchange(kind, axis), m, (P(("a", "b")),), P(("a", "b")), (64, 16))
    found = only(collectives(compiled, m))
    assert found.kind == kind
    assert found.axes == ((axis,) if isinstance(axis, str) else axis)
    assert found.size == n and found.times == 1
    assert found.received_bytes == received(n)


def test_permute_moves_its_operand_to_a_neighbour():
    m = mesh(a=2, b=4)
    ring = [(i, (i + 1) % 4) for i in range(4)]
    compiled = program(
        lambda x: jax.lax.ppermute(x, "b", ring), m, (P(("a", "b")),), P(("a", "b")), (64, 16)
    )
    found = only(collectives(compiled, m))
    assert (found.kind, found.axes, found.received_bytes) == ("collective-permute", ("b",), V)
    assert len(found.groups) == 8  # four pairs for each of the two devices along a


def test_loops_count_as_often_as_they_run():
    m = mesh(a=2, b=4)

    def inner(x, _):
        return jax.lax.psum(jnp.sin(x), "b"), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=5)
        return jax.lax.psum(jnp.cos(x), "a"), None

    compiled = program(
        lambda x: jax.lax.scan(outer, x, None, length=3)[0],
        m,
        (P(("a", "b")),),
        P(("a", "b")),
        (64, 16),
    )
    assert compiled.unknown_loops == ()
    assert table(collectives(compiled, m)) == {
        ("b", "all-reduce"): (15, 15 * 2 * V * 3 / 4),
        ("a", "all-reduce"): (3, 3 * 2 * V * 1 / 2),
    }


def test_an_axis_of_one_device_exchanges_nothing():
    m = mesh(a=1, b=4)
    compiled = program(lambda x: jax.lax.psum(x, "a"), m, (P("b"),), P("b"), (32, 16))
    assert collectives(compiled, m) == []


def test_what_the_partitioner_adds_is_found():
    m = mesh(a=2, b=4)
    x = jax.ShapeDtypeStruct((8, 32), np.float32, sharding=jax.NamedSharding(m, P("a")))
    w = jax.ShapeDtypeStruct((32, 16), np.float32, sharding=jax.NamedSharding(m, P("b")))
    step = jax.jit(lambda x, w: x @ w, out_shardings=jax.NamedSharding(m, P("a")))
    text = step.lower(x, w).compile().as_text()
    found = collectives(hlo.parse(text), m)
    # The weight's quarters are gathered, or the quarters' products summed; nothing crosses "a".
    assert found and {c.axes for c in found} == {("b",)}


@pytest.mark.parametrize(
    "text,groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(2)2}, x", [[0, 1], [2, 3]]),
        (
            "replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}, x",
            [[0, 1], [2, 3]],
        ),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(0,3,1,2) {'y'}, x", [[0, 3], [1, 2]]),
    ],
)
def test_replica_groups_in_all_their_forms(text, groups):
    assert replica_groups(text, 4).tolist() == groups


def test_one_that_goes_on_in_several_fusions_counts_once():
    """As the TPU compiler writes an all-gather that overlaps with two products."""
    chain = 'attributes={chain_id="20"}'
    fusion = """%NAME (p: f32[8,16]) -> f32[16,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %g = f32[16,16]{1,0} all-gather(%p), channel_id=68, replica_groups={{0,1}}, CHAIN
}

"""
    text = "HloModule m, is_scheduled=true\n\n" + "".join(
        fusion.replace("NAME", name).replace("%g", f"%{name}.g").replace("CHAIN", chain)
        for name in ("start", "middle", "done")
    )
    text += """ENTRY %main (x: f32[8,16]) -> f32[16,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %a = f32[16,16]{1,0} fusion(%x), kind=kCustom, calls=%start
  %b = f32[16,16]{1,0} fusion(%x), kind=kCustom, calls=%middle
  ROOT %c = f32[16,16]{1,0} fusion(%x), kind=kCustom, calls=%done
}
"""
    assert only(collectives(hlo.parse(text), mesh(a=2))).received_bytes == V
    apart = text.replace(chain, "attributes={}")  # else equal channels say nothing
    assert len(collectives(hlo.parse(apart), mesh(a=2))) == 3


def sending(target: str, kind: str = "ALL_REDUCE") -> hlo.Program:
    """As libtpu writes it; `test_tpu_programs.py` has real ones."""
    attributes = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"'
    text = """HloModule m, num_partitions=1

ENTRY %main (x: f32[8,16]) -> token[] {
  %x = f32[8,16]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[8,16]{1,0}, u32[], token[]) send(%x, %t), frontend_attributes={ATTRIBUTES}
  ROOT %d = token[] send-done(%s), is_host_transfer=true
}
"""
    return hlo.parse(text.replace("ATTRIBUTES", attributes))


def sent(target: str, kind: str = "ALL_REDUCE") -> hlo.Instruction:
    return sending(target, kind).computations["main"].instructions["s"]


@pytest.mark.parametrize(
    "target,ids",
    [
        ('"{1,2}x{0:1}"', [[100000, 200000], [100001, 200001]]),
        ('"{1:3}x{4}"', [[100004, 200004, 300004]]),
        ('"{2,4}x{0,2:3}"', [[200000, 400000], [200002, 400002], [200003, 400003]]),
        ("{{100000,300000},{200001,400001}}", [[100000, 300000], [200001, 400001]]),
        ("{{100000->200000},{200000->100000}}", [[100000, 200000], [200000, 100000]]),
        ("{{100000,200000}}", [[100000, 200000]]),
    ],
)
def test_devices_of_a_transfer_in_all_their_forms(target, ids):
    kind, found = transfer(sent(target))
    assert kind == "all-reduce" and found.tolist() == ids


@pytest.mark.parametrize(
    "target,kind",
    [('"{1,2}x{0:1}"', "BROADCAST"), ('"everyone"', "ALL_REDUCE"), ("{}", "ALL_REDUCE")],
)
def test_an_unknown_form_of_a_transfer_is_an_error(target, kind):
    with pytest.raises(ConfigError, match=r"(?s)form that is not known.*_xla_megascale_target"):
        transfer(sent(target, kind))


def test_a_transfer_to_a_device_that_the_mesh_has_not_is_an_error():
    with pytest.raises(ConfigError, match="names device 100000"):
        collectives(sending('"{1,2}x{0}"'), mesh(a=2))


def test_what_is_sent_to_a_host_alone_is_no_collective():
    alone = sent('"{1,2}x{0:1}"')
    text = alone.text.replace("_xla_megascale_", "_xla_other_")
    assert transfer(dataclasses.replace(alone, text=text)) is None


def test_an_unknown_form_of_groups_is_an_error():
    with pytest.raises(ConfigError, match="form that is not known"):
        replica_groups("replica_groups=@somewhere, x", 4)
