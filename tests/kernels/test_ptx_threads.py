"""The PTX emulator's threads and memory: shuffles, branches, barriers, races, bounds, copies."""

import numpy as np
import pytest

from tests.kernels.ptx_emulator import MemoryFault, RaceError, Window
from tests.kernels.ptx_snippets import threads

# ---------------------------------------------------------------- lanes


def lanes(body):
    """Stores %r1 and %p1 of one warp; %r2 holds 100 + lane."""
    values, flags = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    threads(
        "add.u32 %r2, %r32, 100;\n"
        + body
        + """
        mad.wide.u32 %d1, %r0, 4, %d10;
        st.global.b32 [%d1], %r1;
        selp.b32 %r9, 1, 0, %p1;
        mad.wide.u32 %d1, %r0, 4, %d11;
        st.global.b32 [%d1], %r9;""",
        [values, flags],
    )
    return values.astype(int) - 100, flags.astype(bool)


def test_shuffles():
    lane = np.arange(32)
    moved, found = lanes("shfl.sync.up.b32 %r1|%p1, %r2, 3, 0, -1;")
    np.testing.assert_array_equal(moved, np.where(lane >= 3, lane - 3, lane))
    np.testing.assert_array_equal(found, lane >= 3)
    moved, found = lanes("shfl.sync.down.b32 %r1|%p1, %r2, 5, 31, 0xffffffff;")
    np.testing.assert_array_equal(moved, np.where(lane < 27, lane + 5, lane))
    np.testing.assert_array_equal(found, lane < 27)
    moved, found = lanes("shfl.sync.bfly.b32 %r1|%p1, %r2, 6, 31, -1;")
    np.testing.assert_array_equal(moved, lane ^ 6)
    assert found.all()
    moved, found = lanes("xor.b32 %r3, %r32, 9; shfl.sync.idx.b32 %r1|%p1, %r2, %r3, 31, -1;")
    np.testing.assert_array_equal(moved, lane ^ 9)
    # Segments of eight lanes: c = (32 - 8) << 8 | clamp, as CUDA's width = 8.
    moved, found = lanes("shfl.sync.up.b32 %r1|%p1, %r2, 2, 0x1800, -1;")
    np.testing.assert_array_equal(moved, np.where(lane % 8 >= 2, lane - 2, lane))
    moved, found = lanes("shfl.sync.down.b32 %r1|%p1, %r2, 2, 0x181f, -1;")
    np.testing.assert_array_equal(moved, np.where(lane % 8 < 6, lane + 2, lane))
    np.testing.assert_array_equal(found, lane % 8 < 6)
    moved, found = lanes("shfl.sync.idx.b32 %r1|%p1, %r2, 13, 0x181f, -1;")
    np.testing.assert_array_equal(moved, lane // 8 * 8 + 5)
    # A clamp below the segment's end: the xor's partner lies beyond it.
    moved, found = lanes("shfl.sync.bfly.b32 %r1|%p1, %r2, 16, 15, -1;")
    np.testing.assert_array_equal(moved, np.where(lane >= 16, lane - 16, lane))
    np.testing.assert_array_equal(found, lane >= 16)


def test_votes():
    _, some = lanes("setp.eq.u32 %p2, %r32, 7; vote.sync.any.pred %p1, %p2, -1; mov.b32 %r1, 0;")
    assert some.all()
    _, every = lanes("setp.ne.u32 %p2, %r32, 7; vote.sync.all.pred %p1, %p2, -1; mov.b32 %r1, 0;")
    assert not every.any()
    ballot, leads = lanes(
        "setp.lt.u32 %p2, %r32, 5; vote.sync.ballot.b32 %r1, %p2, -1; elect.sync %r4|%p1, -1;"
    )
    assert (ballot == 31 - 100).all() and list(np.flatnonzero(leads)) == [0]
    total, _ = lanes("redux.sync.add.s32 %r1, %r32, -1; setp.eq.u32 %p1, %r1, 0;")
    assert (total == 31 * 16 - 100).all()


def test_a_shuffle_needs_its_lanes():
    with pytest.raises(RuntimeError, match="names lanes"):
        lanes("setp.lt.u32 %p1, %r32, 8; @%p1 shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;")
    moved, _ = lanes(
        "setp.lt.u32 %p1, %r32, 8; mov.b32 %r1, 0; @%p1 shfl.sync.idx.b32 %r1, %r2, 3, 31, 255;"
    )
    np.testing.assert_array_equal(moved, np.where(np.arange(32) < 8, 3, -100))
    with pytest.raises(RuntimeError, match="not here"):
        lanes("setp.lt.u32 %p1, %r32, 8; @%p1 shfl.sync.idx.b32 %r1, %r2, 20, 31, 255;")


# ---------------------------------------------------------------- control flow


def test_divergent_loops_and_branches():
    # Each thread loops tid % 5 times and adds its counter; odd threads leave through `ret`.
    out = np.zeros(64, np.uint32)
    threads(
        """
        mad.wide.u32 %d1, %r0, 4, %d10;
        rem.u32 %r1, %r0, 5;
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
    LOOP:
        setp.ge.u32 %p1, %r2, %r1;
        @%p1 bra DONE;
        add.u32 %r2, %r2, 1;
        add.u32 %r3, %r3, %r2;
        bra.uni LOOP;
    DONE:
        bar.sync 0;
        st.global.b32 [%d1], %r3;
        and.b32 %r4, %r0, 1;
        setp.eq.u32 %p2, %r4, 1;
        @%p2 ret;
        add.u32 %r3, %r3, 1000;
        st.global.b32 [%d1], %r3;""",
        [out],
        64,
    )
    k = np.arange(64) % 5
    expected = k * (k + 1) // 2 + np.where(np.arange(64) % 2, 0, 1000)
    np.testing.assert_array_equal(out, expected)


def test_lanes_meet_again_behind_a_branch():
    body = """
        setp.lt.u32 %p2, %r32, 9;
        @%p2 bra SKIP;
        add.u32 %r2, %r2, 1000;
    SKIP:
        shfl.sync.bfly.b32 %r1|%p1, %r2, 16, 31, -1;"""
    lane = np.arange(32) ^ 16
    np.testing.assert_array_equal(lanes(body)[0], lane + np.where(lane < 9, 0, 1000))


def test_threads_that_have_ended_are_not_waited_for():
    # Warp 1 and lanes 20 to 31 of warp 0 leave; the others still pass a barrier and a shuffle.
    out = np.zeros(128, np.uint32)
    body = """
        shr.u32 %r1, %r0, 5;
        setp.eq.u32 %p1, %r1, 1;
        @%p1 ret;
        setp.gt.u32 %p1, %r32, 19;
        setp.eq.and.u32 %p1, %r1, 0, %p1;
        @%p1 exit;
        bar.sync 0;
        shfl.sync.idx.b32 %r2, %r0, 4, 31, -1;
        add.u32 %r2, %r2, 1;
        mad.wide.u32 %d1, %r0, 4, %d10;
        st.global.b32 [%d1], %r2;"""
    threads(body, [out], 128)
    expected = np.arange(128) // 32 * 32 + 5
    expected[20:64] = 0
    np.testing.assert_array_equal(out, expected)


def test_labels_and_registers_of_a_scope():
    out = np.zeros(32, np.uint32)
    # A name of an inner scope hides the outer one.
    body = "mov.b32 %r5, 7; { .reg .b32 %r5; mov.b32 %r5, 9; { mov.b32 %r5, 11; } } "
    threads(body + "mad.wide.u32 %d1, %r0, 4, %d10; st.global.b32 [%d1], %r5;", [out])
    assert (out == 7).all()
    once = """{
        .reg .b32 n; .reg .pred more;
        mov.b32 n, 3;
      AGAIN:
        add.u32 %r5, %r5, n;
        sub.u32 n, n, 1;
        setp.ne.u32 more, n, 0;
        @more bra AGAIN;
    }
    """
    store = "mad.wide.u32 %d1, %r0, 4, %d10; st.global.b32 [%d1], %r5;"
    threads("mov.b32 %r5, 0;" + once + once + store, [out])
    assert (out == 12).all()


def test_barriers_of_some_warps():
    # Warps 0 and 1 exchange through barrier 1, warps 2 and 3 through barrier 2.
    out = np.zeros(128, np.uint32)
    body = """
        mov.b32 %r1, smem;
        mad.lo.u32 %r2, %r0, 4, %r1;
        shr.u32 %r3, %r0, 6;
        setp.eq.u32 %p1, %r3, 0;
        st.shared.b32 [%r2], %r0;
        @%p1 bra FIRST;
        {other}
        bra MEET;
    FIRST:
        bar.sync 1, 64;
    MEET:
        xor.b32 %r4, %r0, 32;
        mad.lo.u32 %r4, %r4, 4, %r1;
        ld.shared.b32 %r5, [%r4];
        mad.wide.u32 %d1, %r0, 4, %d10;
        st.global.b32 [%d1], %r5;"""
    threads(body.format(other="bar.sync 2, 64;"), [out], 128, 512)
    np.testing.assert_array_equal(out, np.arange(128) ^ 32)
    with pytest.raises(RaceError, match="warp 2 reads"):
        threads(body.format(other=""), [out], 128, 512)
    with pytest.raises(RuntimeError, match="deadlock"):
        threads("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64;", [out], 64)


def test_an_endless_loop_ends():
    with pytest.raises(RuntimeError, match="no end"):
        threads("HERE: bra HERE;", [np.zeros(1, np.uint32)], max_steps=1000)


def test_ctas_in_batches_see_their_own_numbers():
    grid = (3, 2, 2)
    out = np.zeros((12, 32, 4), np.uint32)
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.u32 %r6, %r3, %r5, %r2;
        mad.lo.u32 %r6, %r6, %r4, %r1;
        shl.b32 %r7, %r6, 5;
        add.u32 %r7, %r7, %r0;
        mad.wide.u32 %d1, %r7, 16, %d10;
        st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r0};"""
    threads(body, [out], grid=grid, batch_threads=32 * 5)
    expected = [
        [[x, y, z, t] for t in range(32)] for z in range(2) for y in range(2) for x in range(3)
    ]
    np.testing.assert_array_equal(out, expected)


# ---------------------------------------------------------------- memory

EXCHANGE = """
    mov.b32 %r1, smem;
    mad.lo.u32 %r2, %r0, 4, %r1;
    st.shared.b32 [%r2], %r0;
    {barrier}
    xor.b32 %r4, %r0, {partner};
    mad.lo.u32 %r4, %r4, 4, %r1;
    ld.shared.b32 %r5, [%r4];
    mad.wide.u32 %d1, %r0, 4, %d10;
    st.global.b32 [%d1], %r5;
    {second}
    st.shared.b32 [%r2], 7;
"""


def exchange(barrier="bar.sync 0;", partner=32, second="bar.sync 0;", **options):
    out = np.zeros(64, np.uint32)
    text = EXCHANGE.format(barrier=barrier, partner=partner, second=second)
    threads(text, [out], 64, 256, **options)
    return out


def test_races_between_warps():
    np.testing.assert_array_equal(exchange(), np.arange(64) ^ 32)
    with pytest.raises(RaceError, match="warp 0 reads shared address 128") as caught:
        exchange(barrier="")
    assert "ld.shared.b32 %r5, [%r4]" in "".join(caught.value.__notes__)
    with pytest.raises(RaceError, match=r"writes shared address .* read since"):
        exchange(second="")
    # Lanes of one warp need no barrier, and a run that checks nothing finds nothing.
    np.testing.assert_array_equal(exchange(barrier="", partner=1, second=""), np.arange(64) ^ 1)
    exchange(barrier="", check_races=False)


def test_a_release_and_an_acquire_order_ctas():
    # CTA 0 writes a word and raises a flag; CTA 1 looks at the flag and copies the word.
    body = """
        mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra SECOND;
        mov.b32 %r2, 7; st.global.b32 [%d10], %r2;
        mov.b32 %r3, 1; setp.eq.u32 %p2, %r0, 0;
        @%p2 atom.global.gpu.{release}.add.u32 %r4, [%d11], %r3;
        bra DONE;
        SECOND: {look}
        ld.global.b32 %r5, [%d10]; st.global.b32 [%d12], %r5;
        DONE:"""

    def run(release, look):
        out = [np.zeros(1, np.uint32) for _ in range(3)]
        code = body.format(release=release, look=look)
        threads(code, out, grid=(2, 1, 1), batch_threads=32)
        assert out[1][0] == 1
        return out[2][0]

    atomic = "mov.b32 %r3, 0; atom.global.gpu.{}.add.u32 %r6, [%d11], %r3;"
    assert run("release", "ld.global.gpu.acquire.b32 %r6, [%d11];") == 7
    assert run("acq_rel", atomic.format("acq_rel")) == 7
    with pytest.raises(RaceError, match="CTA 1 reads byte 0 of p0.*CTA 0 wrote there"):
        run("relaxed", atomic.format("acquire"))
    with pytest.raises(RaceError, match="CTA 1 reads byte 0 of p0.*CTA 0 wrote there"):
        run("release", atomic.format("relaxed"))


def test_races_of_two_writers():
    body = """
        mov.b32 %r1, smem;
        setp.ge.u32 %p1, %r0, 32;
        @%p1 st.shared.b{width} [%r1+{offset}], {first};
        @!%p1 st.shared.b{width} [%r1], {second};"""

    def write(**case):
        text = "mov.b32 %r2, 5; mov.b32 %r3, 6; cvt.u16.u32 %h2, %r2; cvt.u16.u32 %h3, %r3;"
        threads(text + body.format(**case), [], 64, 256)

    with pytest.raises(RaceError, match=r"warp 0 writes shared address 0, which warps \[1\] wrote"):
        write(width=32, offset=0, first="%r2", second="%r3")
    write(width=32, offset=0, first="%r2", second="%r2")  # the same value: a replicated layout
    write(width=16, offset=2, first="%h2", second="%h3")  # halves of one word are no conflict
    with pytest.raises(RaceError, match="different values to shared address 0 at once"):
        threads("mov.b32 %r1, smem; st.shared.b32 [%r1], %r0;", [], 64, 256)


def test_races_between_ctas():
    out = np.zeros(64, np.uint32)
    store = "mov.u32 %r1, %ctaid.x; {} mad.wide.u32 %d1, %r2, 4, %d10; st.global.b32 [%d1], {};"
    own = "mad.lo.u32 %r2, %r1, 32, %r0;"
    for batch in (32, 64):  # CTAs one after the other, or both at once
        options = dict(grid=(2, 1, 1), batch_threads=batch)
        threads(store.format(own, "%r2"), [out], **options)
        np.testing.assert_array_equal(out, np.arange(64))
        threads(store.format("mov.b32 %r2, %r0;", "%r0"), [out], **options)  # twice the same
        with pytest.raises(RaceError, match="byte 0 of p0"):
            threads(store.format("mov.b32 %r2, %r0;", "%r1"), [out], **options)
        with pytest.raises(RaceError, match="CTA 1 reads byte 0 of p0.*CTA 0 wrote there"):
            threads(store.format(own, "%r2") + "ld.global.b32 %r5, [%d10];", [out], **options)
        count = np.zeros(1, np.uint32)
        threads("red.global.add.u32 [%d10], 1;", [count], **options)
        assert count[0] == 64


def test_bounds_and_alignment():
    store = "mad.wide.u32 %d1, %r0, 4, %d10; st.global.b32 [%d1+{}], %r0;"
    out = np.zeros(32, np.uint32)
    threads(store.format(0), [out])
    np.testing.assert_array_equal(out, np.arange(32))
    with pytest.raises(MemoryFault, match=r"byte 128 of p0, which holds bytes \[0, 128\)"):
        threads(store.format(4), [out])
    with pytest.raises(MemoryFault, match="byte -4 of p0"):
        threads(store.format(-4), [out])
    with pytest.raises(MemoryFault, match="not a multiple of 4"):
        threads(store.format(2), [np.zeros(64, np.uint32)])
    with pytest.raises(MemoryFault, match="not a multiple of 16"):
        threads("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d10+8];", [np.zeros(64, np.uint32)])
    with pytest.raises(MemoryFault, match="no array"):
        threads("mov.b64 %d1, 64; ld.global.b32 %r1, [%d1];", [])
    with pytest.raises(MemoryFault, match="4 bytes at shared address 256 of 256"):
        threads("mov.b32 %r1, smem; ld.shared.b32 %r2, [%r1+256];", [], 32, 256)
    # The lanes that a predicate leaves out may point anywhere.
    threads("setp.lt.u32 %p1, %r0, 31;" + store.replace("st.", "@%p1 st.").format(4), [out])
    np.testing.assert_array_equal(out, [0, *range(31)])


def test_arrays_of_no_axes_and_of_no_elements():
    one = np.array(0, np.uint32)
    threads("red.global.add.u32 [%d10], 2;", [one])
    assert one == 64
    with pytest.raises(MemoryFault, match=r"byte 0 of p0, which holds bytes \[0, 0\)"):
        threads("ld.global.b32 %r1, [%d10];", [np.zeros((0, 3), np.uint32)])


def test_offsets_beyond_32_bits():
    far = np.arange(8, dtype=np.uint32)
    near = np.zeros(8, np.uint32)
    window = Window({0: near, 3 * 2**32: far})
    body = """
        setp.lt.u32 %p1, %r0, 8;
        mul.wide.u32 %d2, %r0, 4;
        add.s64 %d1, %d10, %d2;
        mov.b64 %d3, 12884901888;
        add.s64 %d3, %d1, %d3;
        @%p1 ld.global.b32 %r1, [%d3];
        @%p1 st.global.b32 [%d1], %r1;"""
    threads(body, [window])
    np.testing.assert_array_equal(near, far)
    with pytest.raises(MemoryFault, match=r"byte 12884901888 of p0"):
        threads(body, [Window({0: near})])


def test_nothing_unwritten_reads_as_zero():
    out = np.zeros((3, 32), np.float32)
    threads(
        """
        mov.b32 %r1, smem;
        ld.shared.b32 %r2, [%r1];
        mad.wide.u32 %d1, %r0, 4, %d10;
        st.global.b32 [%d1], %r2;
        st.global.b32 [%d1+128], %r7;
        mov.f32 %r3, 0f3FC00000;
        st.global.f32 [%d1+256], %r3;""",
        [out],
        shared=16,
    )
    assert np.isnan(out[:2]).all() and (out[2] == 1.5).all()


def test_atomics():
    total, old = np.zeros(2, np.float32), np.zeros(64, np.uint32)
    threads(
        """
        cvt.rn.f32.u32 %r1, %r0;
        red.global.add.f32 [%d10], %r1;
        and.b32 %r2, %r0, 1;
        setp.eq.u32 %p1, %r2, 1;
        @%p1 atom.global.gpu.acq_rel.max.s32 %r3, [%d12], %r0;
        @%p1 atom.global.add.f32 %r4, [%d10+4], 0f3F800000;
        cvt.rzi.u32.f32 %r5, %r4;
        mad.wide.u32 %d1, %r0, 4, %d11;
        @%p1 st.global.b32 [%d1], %r5;""",
        [total, old, top := np.array([-5], np.int32)],
        64,
    )
    np.testing.assert_array_equal(total, [64 * 63 / 2, 32])
    assert sorted(old[1::2]) == list(range(32)) and top[0] == 63


def test_copies_arrive_when_waited_for():
    source, out = np.arange(64, dtype=np.uint32), np.zeros((2, 64), np.uint32)
    body = """
        mad.wide.u32 %d1, %r0, 4, %d10;
        mad.wide.u32 %d2, %r0, 4, %d11;
        mov.b32 %r1, smem;
        mad.lo.u32 %r1, %r0, 4, %r1;
        st.shared.b32 [%r1], 7;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %d1 + 0 ], 0x4, 0x4;
        cp.async.commit_group ;
        cp.async.commit_group ;
        cp.async.wait_group {};
        ld.shared.b32 %r2, [%r1];
        st.global.b32 [%d2], %r2;
        cp.async.wait_group 0;
        ld.shared.b32 %r2, [%r1];
        st.global.b32 [%d2+256], %r2;"""
    threads(body.format(2), [source, out], 64, 256)
    assert (out[0] == 7).all()
    np.testing.assert_array_equal(out[1], source)
    threads(body.format(1), [source, out], 64, 256)
    np.testing.assert_array_equal(out[0], source)


def test_bytes_that_a_vector_load_does_not_use():
    # LLVM reads 16 bytes for the first 12; another warp may be writing the last four.
    body = """
        mov.b32 %r1, smem;
        setp.lt.u32 %p1, %r0, 32;
        @%p1 st.shared.v2.b32 [%r1], {{%r1, %r1}};
        @%p1 st.shared.b32 [%r1+8], %r1;
        @!%p1 st.shared.b32 [%r1+12], %r1;
        {}
        @%p1 ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1];"""
    threads(body.format('.pragma "used_bytes_mask 0xfff";'), [], 64, 128)
    for mask in ("", '.pragma "used_bytes_mask 0xffff";', '.pragma "used_bytes_mask 0xf000";'):
        with pytest.raises(RaceError, match="warp 0 reads shared address 12"):
            threads(body.format(mask), [], 64, 128)


def test_races_of_copies():
    # Both warps copy to the same place, from the same or from different places.
    source = np.arange(64, dtype=np.uint32)
    body = """
        mov.b32 %r1, smem;
        mad.lo.u32 %r1, %r32, 4, %r1;
        mad.wide.u32 %d1, {}, 4, %d10;
        cp.async.ca.shared.global [%r1], [%d1], 4;
        cp.async.commit_group;
        {}
        cp.async.wait_group 0;
        {}
        xor.b32 %r2, %r1, 4;
        ld.shared.b32 %r2, [%r2];
        mad.wide.u32 %d1, %r0, 4, %d11;
        st.global.b32 [%d1], %r2;"""
    out = np.zeros(64, np.uint32)
    threads(body.format("%r32", "", "bar.sync 0;"), [source, out], 64, 128)
    np.testing.assert_array_equal(out, np.tile(np.arange(32) ^ 1, 2))
    with pytest.raises(RaceError, match="shared address 0"):
        threads(body.format("%r0", "", "bar.sync 0;"), [source, out], 64, 128)
    # Where copies have gone before, stores of one value by two warps are still no conflict.
    twice = "setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.b32 [%r1+64], 5;"
    twice += "@!%p1 st.shared.b32 [%r1+64], {}; bar.sync 0;"
    one = body.replace("%r32, 4, %r1", "0, 4, %r1")
    same = "and.b32 %r3, %r0, 15; mov.b32 %r1, smem;"
    threads(one.format("0", same + twice.format(5), "bar.sync 0;"), [source, out], 64, 128)
    with pytest.raises(RaceError, match="warp 1 writes shared address 64"):
        threads(one.format("0", same + twice.format(6), "bar.sync 0;"), [source, out], 64, 128)
    # A read while another warp's copy is under way; and after its arrival, with no barrier.
    early = "setp.ge.u32 %p2, %r0, 32; @%p2 ld.shared.b32 %r3, [%r1];"
    one = body.replace("cp.async.ca", "setp.lt.u32 %p3, %r0, 32; @%p3 cp.async.ca")
    with pytest.raises(RaceError, match="warp 1 reads"):
        threads(one.format("%r32", early, "bar.sync 0;"), [source, out], 64, 128)
    with pytest.raises(RaceError, match="warp 1 reads"):
        threads(one.format("%r32", "bar.sync 0;", ""), [source, out], 64, 128)


def test_matrices():
    # Row r of matrix m holds 100 m + 8 r + column; lanes 8 m to 8 m + 7 hold the rows' addresses.
    out = np.zeros((2, 32, 8), np.uint16)
    body = """
        mov.b32 %r1, smem;
        mad.lo.u32 %r1, %r32, 16, %r1;
        shr.u32 %r2, %r32, 3;
        and.b32 %r3, %r32, 7;
        mul.lo.u32 %r2, %r2, 100;
        mad.lo.u32 %r2, %r3, 8, %r2;
        mad.lo.u32 %r4, %r2, 65537, 65536;
        add.u32 %r5, %r4, 131074;
        add.u32 %r6, %r5, 131074;
        add.u32 %r7, %r6, 131074;
        st.shared.v4.b32 [%r1], {{%r4, %r5, %r6, %r7}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r11, %r12, %r13, %r14}}, [%r1];
        mad.wide.u32 %d1, %r0, 16, %d10;
        st.global.v4.b32 [%d1], {{%r11, %r12, %r13, %r14}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1], {{%r11, %r12, %r13, %r14}};
        ld.shared.v4.b32 {{%r11, %r12, %r13, %r14}}, [%r1];
        st.global.v4.b32 [%d1+512], {{%r11, %r12, %r13, %r14}};"""
    matrix = np.arange(8)[:, None] * 8 + np.arange(8)
    stored = np.concatenate([100 * m + matrix for m in range(4)])
    for trans in ("", ".trans"):
        threads(body.format(trans=trans), [out], 32, 512)
        for m in range(4):
            one = 100 * m + (matrix.T if trans else matrix)
            # Lane 4 r + c holds columns 2 c and 2 c + 1 of row r.
            np.testing.assert_array_equal(out[0][:, 2 * m : 2 * m + 2], one.reshape(32, 2))
        np.testing.assert_array_equal(out[1], stored)


def test_profile():
    out, source = np.zeros(64, np.uint32), np.zeros(4096, np.uint32)

    def counts(body, line):
        report = threads("mov.b32 %r1, smem;" + body, [out, source], 64, 8192, profile=True)
        text = [i.text for i in report.kernel.instructions]
        k = text.index(line)
        p = report.profile
        return [int(x[k]) for x in (p.warps, p.waves, p.least_waves, p.sectors, p.least_sectors)]

    for stride, waves in [(4, 1), (8, 2), (128, 32), (0, 1), (132, 1)]:
        load = "ld.shared.b32 %r3, [%r2]"
        body = f"rem.u32 %r4, %r0, 32; mad.lo.u32 %r2, %r4, {stride}, %r1; {load};"
        assert counts(body, load) == [2, 2 * waves, 2, 0, 0], stride
    for width, waves in [("v2", 2), ("v4", 4)]:  # 256 and 512 bytes a warp, no conflicts
        registers = "{%r4, %r5}" if width == "v2" else "{%r4, %r5, %r6, %r7}"
        load = f"ld.shared.{width}.b32 {registers}, [%r2]"
        body = f"mad.lo.u32 %r2, %r0, {2 * waves * 2}, %r1; {load};"
        assert counts(body, load) == [2, 2 * waves, 2 * waves, 0, 0]
    for stride, sectors in [(4, 4), (8, 8), (32, 32), (64, 32), (0, 1)]:
        load = "ld.global.b32 %r3, [%d1]"
        least = 1 if stride == 0 else 4
        got = counts(f"mad.wide.u32 %d1, %r0, {stride}, %d11; {load};", load)
        assert got == [2, 0, 0, 2 * sectors, 2 * least]
    some = "setp.lt.u32 %p1, %r0, 32; @%p1 ld.global.b32 %r3, [%d11];"
    assert counts(some, "@%p1 ld.global.b32 %r3, [%d11]") == [2, 0, 0, 1, 1]


def test_what_it_does_not_know():
    with pytest.raises(NotImplementedError, match=r"tcgen05.wait::ld.sync.aligned"):
        threads("tcgen05.wait::ld.sync.aligned;", [])
    with pytest.raises(NotImplementedError, match="set.lt.u32.f16x2"):
        threads("set.lt.u32.f16x2 %r1, %r2, %r3;", [])
    with pytest.raises(NotImplementedError, match="dp4a.u32.u32 %r1, %r2, %r3, %r4") as caught:
        threads("dp4a.u32.u32 %r1, %r2, %r3, %r4;", [])
    assert "PTX line" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="5 arguments for 4 parameters"):
        threads("", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="num_threads is 48"):
        threads("", [], 48)
