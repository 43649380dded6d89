"""Reading libtpu's dumps, on a small one written by hand in its form."""

import dataclasses

import pytest

from storm_kernels import tpu_cost

SCHEDULE = """
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %s1 = sphi 0 } /* Start region 7 :: Start region 8 */
   0x2 LB: >> { %s2 = sphi 0  ;;  %p3_p1 = scmp.ge.s32.totalorder %s2, 5 /* loop exit test */ } /* Start region 9 */
   0x3   : >> { %4 = sbr.rel (!%p3_p1) target = $region9 }
   0x4   : >> { }
   0x5   : >> { }
   0x6   : >> { }
   0x7   : >> { }
   0x8   : > { %p5_p2 = scmp.ge.s32.totalorder (%p3_p1), %s1, 3 /* loop exit test */ }
   0x9   : > { %6 = sbr.rel (!%p5_p2) target = $region7 }
   0xa   : > { %7 = sbr.rel (%p9_p2) target = $region30 }
   0xb   :  { }
   0xc   :  { }
   0xd   :  { } /* Start region 30 */
   0xe   :  { }
"""  # noqa: E501


@pytest.fixture
def kernel(tmp_path):
    names = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    rows = [[0, 0, 4, 0, i in (2, 3), 1, 0, 0, i == 2, 1] for i in range(15)]
    lines = ["== CAPACITY:", names, "4 3 4 2 1 3 3 1 1 2", "== UTILIZATION:"]
    lines += [" ".join(str(int(x)) for x in row) for row in rows]
    stem = "123-my_kernel.1"
    utilization = f"{stem}-70-final_hlo-static-per-bundle-utilization.txt"
    (tmp_path / utilization).write_text("\n".join(lines))
    (tmp_path / f"{stem}-72-final_bundles.txt").write_text(SCHEDULE)
    analysis = tmp_path / f"{stem}-71-schedule-analysis_final_bundles.txt"
    analysis.write_text('custom_call_target="tpu_custom_call"')
    # A fusion of XLA's is not a kernel.
    (tmp_path / utilization.replace("my_kernel", "fusion")).write_text("\n".join(lines))
    (tmp_path / "123-fusion.1-72-final_bundles.txt").write_text(SCHEDULE)
    [kernel] = tpu_cost.parse_dump(tmp_path)
    return kernel


def test_loops_are_found_with_their_trips(kernel):
    assert kernel.name == "my_kernel" and kernel.bundles == 15 and kernel.capacity["VALU"] == 4
    assert [(x.first, x.last, x.trips) for x in kernel.loops] == [(2, 8, 5), (1, 14, 3)]
    assert kernel.innermost() == [kernel.loops[0]] == [kernel.hot_loop()]
    assert kernel.loops[0].slots["VALU"] == 24 and kernel.loops[0].slots["EUP"] == 2
    assert kernel.spills == 1


def test_inner_loops_count_as_often_as_they_run(kernel):
    executed = kernel.executed(kernel.loops[1])
    assert executed["bundle"] == 13 - 6 + 5 * 6
    assert executed["EUP"] == 2 * 5 and executed["VALU"] == 4 * (13 - 6 + 5 * 6)


def test_the_scan_among_kernels_in_any_order(kernel):
    forward, backward = (
        dataclasses.replace(kernel, name=f"selective_scan_{name}")
        for name in ("forward", "backward")
    )
    for kernels in ([forward, backward], [backward, forward], [kernel, backward, forward]):
        assert tpu_cost.scan_kernel(kernels, backward=False) is forward
        assert tpu_cost.scan_kernel(kernels, backward=True) is backward


def test_roofline_names_the_binding_resource(kernel):
    cost = tpu_cost.ScanCost("k", 2.0, 1.9, 0.1, {"VALU": 7.0, "EUP": 1.0}, 0)
    sizes = {"batch": 1, "length": 65536, "channels": 2304, "state": 16}
    moved = tpu_cost.scan_hbm_bytes(**sizes, itemsize=2, fused=True, backward=False)
    line = tpu_cost.roofline(cost, kernel, "v5e", **sizes, hbm_bytes=moved)
    registers = 65536 * 3 * 16
    assert line.resource == "issue" and line.ms == pytest.approx(registers * 2 / 1.5e6)
    assert line.by_resource["VALU"] == pytest.approx(registers * 7 / 4 / 1.5e6)
    assert line.by_resource["EUP"] == pytest.approx(registers / 1.5e6)
    # u, delta, z, y, and B and C padded to 128 lanes, twice.
    assert line.by_resource["HBM"] == pytest.approx(65536 * 2 * (4 * 2304 + 2 * 2 * 128) / 819e6)
