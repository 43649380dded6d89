"""FLOPs and memory traffic of small compiled programs against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.aot import hlo
from storm_jax.aot.work import device_work


def compiled(function, *shapes, dtype=np.float32) -> hlo.Program:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_product():
    work = device_work(compiled(lambda x, w: x @ w, (64, 32), (32, 16)))
    assert work.flops == 2 * 64 * 32 * 16
    assert work.hbm_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_products_in_nested_loops():
    def outer(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0], None

    def function(x, ws):
        return jax.lax.scan(outer, x, ws)[0]

    program = compiled(function, (8, 32), (3, 32, 32))
    assert device_work(program).flops == 3 * 7 * 2 * 8 * 32 * 32
    assert program.unknown_loops == ()


def test_a_gradient_with_and_without_recomputation():
    def loss(w, x, policy):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        layer = layer if policy is None else jax.checkpoint(layer, policy=policy)
        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    product = 2 * 64 * 32 * 32
    everything = jax.checkpoint_policies.nothing_saveable
    for policy, passes in ((None, 3), (everything, 4)):
        program = compiled(
            lambda w, x, policy=policy: jax.grad(loss, (0, 1))(w, x, policy),
            (5, 32, 32),
            (64, 32),
        )
        assert device_work(program).flops == passes * 5 * product


def test_a_conditional_counts_its_larger_branch():
    def small(x, w):
        return x @ w

    def large(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=6)[0]

    def function(x, w):
        return jax.lax.cond(jnp.sum(x) > 0, small, large, x, w)

    assert device_work(compiled(function, (8, 32), (32, 32))).flops == 6 * 2 * 8 * 32 * 32


def test_a_batched_product():
    def function(x, y):
        return jnp.einsum("bij,bkj->bik", x, y)

    work = device_work(compiled(function, (4, 8, 16), (4, 6, 16)))
    assert work.flops == 2 * 4 * 8 * 6 * 16


@pytest.mark.parametrize("padding,meetings", [("VALID", 30 * 3), ("SAME", 32 * 3 - 2)])
def test_a_convolution_counts_what_meets(padding, meetings):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC")
        )

    work = device_work(compiled(convolve, (2, 32, 8), (3, 8, 16)))
    assert work.flops == 2 * 2 * 8 * 16 * meetings


def test_a_loop_reads_its_slice_and_not_the_stack():
    layers, n = 100, 1024

    def function(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.sin(x) * w, None), x, ws)[0]

    traffic = device_work(compiled(function, (n,), (layers, n))).hbm_bytes
    # One read of the carry and of a slice, one write: a few times n a layer, not layers * n.
    assert 3 * 4 * n * layers <= traffic <= 10 * 4 * n * layers


def test_the_parser_reads_layouts_spaces_and_tuples():
    shapes = hlo.shapes(
        "(f32[8,128]{1,0:T(8,128)S(1)}, /*index=1*/bf16[2,3]{1,0}, s32[], pred[5]{0})"
    )
    assert [s.bytes for s in shapes] == [4096, 12, 4, 5]
    assert [s.space for s in shapes] == [1, 0, 0, 0]
    assert hlo.shapes("f8e4m3fn[4]{0}")[0].bytes == 4
    assert hlo.shapes("s4[3]{0}")[0].bytes == 2


def test_line_breaks_in_attributes_end_nothing():
    text = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %k = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", a={b={
"block": "8"
}}, metadata={op_name="f/attention/pallas_call"}, config={"cost_estimate":{"flops":96}}
  ROOT %r = f32[4]{0} negate(%k)
}
"""
    program = hlo.parse(text)
    assert list(program.computations["main"].instructions) == ["x", "k", "r"]
    assert device_work(program).flops == 96
    silent = hlo.parse(text.replace("cost_estimate", "nothing"))
    assert device_work(silent).silent_kernels == {"attention": 1}


def test_a_trip_count_is_read_from_the_condition():
    text = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[4]{0} negate(%x)
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %y)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[4]{0}) tuple(%zero, %x)
  %w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body
  ROOT %r = f32[4]{0} get-tuple-element(%w), index=1
}
"""
    program = hlo.parse(text.replace("LIMIT", "12"))
    assert program.executions["body"] == 12
    assert device_work(program).hbm_bytes == 12 * (3 * 4 + 2 * 16)
    # A limit that is not in the text: the body counts once, and the loop is named.
    unread = text.replace("%end = s32[] constant(LIMIT)", "%end = s32[] negate(%i)")
    assert hlo.parse(unread).unknown_loops == ("w",)
