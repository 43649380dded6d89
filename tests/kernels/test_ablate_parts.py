"""The parts of `python -m storm_kernels.ablate`: shapes, floors, times, errors, programs."""

import statistics

import jax
import numpy as np
import pytest

from storm_kernels.ablation import errors, floors, implementations, programs, timing
from storm_kernels.ablation.operands import OPTIONAL, Setting, cotangents, operands
from storm_kernels.ablation.report import digits, memory
from storm_kernels.ablation.shapes import SETS, Shape, parse_shape
from storm_kernels.selective_scan import selective_scan
from storm_kernels.selective_scan.shapes import default_chunk
from tests.kernels.ablate_command import compile_quickly
from tests.kernels.scan_oracle import oracle

SMALL = Shape(2, 12, 37, 3)


@pytest.fixture(autouse=True)
def quick_compile(monkeypatch):
    compile_quickly(monkeypatch)


# ------------------------------------------------------------------------------------------ shapes


def test_the_named_sets_hold_the_shapes_at_which_mamba_ssm_was_measured():
    measured = {
        (1, 2304, 65536), (1, 7168, 32768), (1, 7168, 16384), (1, 2304, 8192),
        (2, 4608, 16384), (8, 2048, 4096), (32, 2304, 1024),
    }  # fmt: skip
    model = SETS["storm_4b"] + SETS["storm_7b"]
    assert measured <= {(s.batch, s.channels, s.length) for s in model}
    assert {(s.state, s.groups) for s in model} == {(16, None)}
    tests = SETS["mamba_ssm_tests"]
    assert {(s.batch, s.channels, s.state) for s in tests} == {(2, 4, 8)}
    assert {(s.length, s.groups) for s in tests} >= {(1134, 1), (4096, 2), (8, 2)}


def test_parse_shape():
    assert parse_shape("2,4,372") == Shape(2, 4, 372, 16, None)
    assert parse_shape("2,4,372,8,2") == Shape(2, 4, 372, 8, 2)
    for text in ("", "1,2", "1,2,3,4,1,6", "1,2,x", "1,0,3", "1,2,-3"):
        with pytest.raises(ValueError, match="batch,channels,length"):
            parse_shape(text)
    with pytest.raises(ValueError, match="3 channels are no multiple of its 2 groups"):
        parse_shape("1,3,4,5,2")


def test_at_most():
    assert Shape(8, 4, 100).at_most(batch=2, length=30) == Shape(2, 4, 30)
    assert Shape(1, 4, 10).at_most(batch=2, length=30) == Shape(1, 4, 10)


# ------------------------------------------------------------------------------------------ floors


def test_floors_of_an_h100_are_those_computed_by_hand():
    """kernels.md, section 5, at B=1, E=2304, L=65536, N=16: milliseconds to two digits."""
    h100 = floors.device_rates("NVIDIA H100 80GB HBM3")
    shape = Shape(1, 2304, 65536)
    forward = floors.floor(h100, shape, Setting("bf16"), "forward")
    assert forward.by_resource["HBM"] == pytest.approx(0.40, abs=0.006)
    assert forward.by_resource["MUFU"] == pytest.approx(0.82, abs=0.006)
    assert (forward.resource, forward.ms) == ("MUFU", forward.by_resource["MUFU"])
    plain = Setting("bf16", ())
    assert floors.floor(h100, shape, plain, "forward").by_resource["MUFU"] == pytest.approx(
        0.65, abs=0.006
    )
    wide = floors.floor(h100, shape, Setting("f32"), "forward")
    assert wide.by_resource["HBM"] == pytest.approx(0.81, abs=0.006)
    backward = floors.floor(h100, shape, Setting("bf16"), "backward")
    assert backward.by_resource["HBM"] == pytest.approx(0.71, abs=0.006)
    assert backward.by_resource["MUFU"] == pytest.approx(0.86, abs=0.006)
    assert backward.resource == "issue"
    both = floors.floor(h100, shape, Setting("bf16"), "both")
    assert both.ms == pytest.approx(forward.ms + backward.ms)


@pytest.mark.parametrize(
    "kind, hbm_forward, hbm_backward, valu",
    [
        ("TPU v5 lite", 1.48, 2.59, 2.75),
        ("TPU v5", 0.44, 0.77, 1.18),
        ("TPU v6e", 0.74, 1.29, 2.36),
    ],
)
def test_floors_of_tpus_are_those_computed_by_hand(kind, hbm_forward, hbm_backward, valu):
    rates, shape = floors.device_rates(kind), Shape(1, 2304, 65536)
    forward = floors.floor(rates, shape, Setting("bf16"), "forward")
    backward = floors.floor(rates, shape, Setting("bf16"), "backward")
    assert forward.by_resource["HBM"] == pytest.approx(hbm_forward, abs=0.011)
    assert backward.by_resource["HBM"] == pytest.approx(hbm_backward, abs=0.011)
    assert forward.by_resource["VALU"] == pytest.approx(valu, abs=0.006)
    assert forward.resource == "VALU"


def test_devices_without_known_rates_have_no_floor():
    for kind in ("cpu", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 3090", "TPU v3"):
        assert floors.device_rates(kind) is None
    assert floors.tpu_generation("TPU v5 lite") == "v5e"


# ------------------------------------------------------------------------------------------ timing


class Clockwork:
    """A program whose times are known."""

    def __init__(self, times):
        self.times, self.calls = list(times), []

    def seconds(self, calls):
        self.calls.append(calls)
        return self.times[min(len(self.calls), len(self.times)) - 1]


def test_measure_gives_the_median_and_quartiles_of_the_samples(monkeypatch):
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.0)
    program = Clockwork([9.0, 1.0, 5.0, 2.0, 4.0, 3.0])  # the first one warms up
    found = timing.measure(program, repeats=5, seconds=60.0, queued=False)
    assert (found.median, found.quartile_1, found.quartile_3) == (3000.0, 2000.0, 4000.0)
    assert (found.best, found.samples, found.calls) == (1000.0, 5, 1)
    assert found.median == 1e3 * statistics.median(program.times[1:])


def test_measure_queues_short_calls_and_stops_when_time_is_up(monkeypatch):
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.0)
    program = Clockwork([1e-3])
    found = timing.measure(program, repeats=50, seconds=1e-9, queued=True)
    assert found.calls == 20 and found.samples == 3
    assert program.calls == [1, 20, 20, 20, 20]  # how long is a call; a queue to warm up; samples


# ------------------------------------------------------------------------------ errors in float64


@pytest.mark.parametrize("layout", ["bld", "bdl"])
@pytest.mark.parametrize("groups, reverse", [(None, False), (3, True)])
def test_exact_values_are_those_of_the_whole_problem(layout, groups, reverse):
    shape = Shape(3, 30, 23, 4, groups)
    setting = Setting("bf16", OPTIONAL, layout, reverse)
    case = operands(shape, setting)
    exact = errors.exact(shape, case, setting)
    assert set(exact.rows) == {0, 2}
    assert len(exact.channels) < 30 and {0, 29} <= set(exact.channels)

    def bld(x):
        return np.swapaxes(x, 1, 2) if layout == "bdl" else np.asarray(x)

    plain = case | {name: bld(case[name]) for name in ("u", "delta", "z")}
    dy, dh = bld(exact.cotangents["y"]), exact.cotangents["h"]
    y, h, gradients = oracle(plain, dy, dh, reverse=reverse)
    found = {"y": bld(y), "h": h}
    assert max(exact.errors(found, "", setting).values()) < 1e-12
    turned = gradients | {name: bld(gradients[name]) for name in ("u", "delta", "z")}
    by_name = exact.errors(turned, "d", setting)
    assert set(by_name) == {"d" + name for name in case if name != "segment_ids"}
    assert max(by_name.values()) < 1e-11

    # A single wrong number at the last position is seen.
    y[2, -1 if not reverse else 0, 29] += 0.1 * np.abs(y).max()
    assert exact.errors({"y": bld(y)}, "", setting)["y"] > 0.05


def test_operands_are_the_same_in_both_layouts_and_step_sizes_are_those_of_mamba():
    shape = Shape(1, 64, 50)
    bld, bdl = (operands(shape, Setting("f32", OPTIONAL, layout)) for layout in ("bld", "bdl"))
    for name, x in bld.items():
        other = np.swapaxes(bdl[name], 1, 2) if name in ("u", "delta", "z") else bdl[name]
        np.testing.assert_array_equal(x, other)
    assert (np.asarray(bld["A"]) == -np.arange(1, 17)).all()
    ids = np.asarray(bld["segment_ids"][0])
    assert list(np.unique(ids)) == [-1, 0, 1, 2, 3] and (ids[-3:] == -1).all()
    for optional in ((), ("bias",), ("softplus",)):
        case = operands(shape, Setting("f32", optional))
        dt = case["delta"] + case.get("delta_bias", 0.0)
        dt = np.asarray(jax.nn.softplus(dt) if "softplus" in optional else dt)
        assert 0 < dt.min() and dt.max() < 0.21 and 0.005 < np.median(dt) < 0.03
    tests = operands(Shape(2, 4, 9, 8, 2, "mamba_ssm"), Setting("f32"))
    assert -0.5 <= tests["A"].min() and tests["A"].max() <= 0
    assert 0 <= tests["delta"].min() and tests["delta"].max() <= 0.5


# ---------------------------------------------------------------------------------------- programs


def own(name):
    return implementations.own(name, "cpu").scan


def test_backward_is_the_vjp_alone_and_counts_what_the_forward_saves():
    shape, setting = SMALL, Setting("f32")
    case, given = operands(shape, setting), cotangents(shape, setting)
    program = programs.backward(own("xla"), case, setting, given)
    found = program.values()
    expected = programs.both(own("xla"), case, setting, given).values()
    for name in case:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)
    # A state for every chunk, and the state that the caller did not give; no operand.
    state = 4 * shape.batch * shape.channels * shape.state
    assert program.saved_bytes == state * (1 + -(-shape.length // default_chunk("cpu")))
    # JAX's own derivative keeps at least every state.
    assert programs.backward(own("reference"), case, setting, given).saved_bytes > 37 * state
    assert programs.forward(own("xla"), case, setting).saved_bytes is None


def test_backward_of_a_custom_vjp_that_closes_over_segment_ids():
    shape, setting = SMALL, Setting("f32", ("segments",))
    case, given = operands(shape, setting), cotangents(shape, setting)

    def closing(case, setting):
        ids = case["segment_ids"]

        def scan(u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, segment_ids=ids, implementation="xla")

        wrapped = jax.custom_vjp(scan)
        wrapped.defvjp(lambda *x: (scan(*x), x), lambda kept, dy: jax.vjp(scan, *kept)[1](dy))
        return wrapped(*(case[name] for name in ("u", "delta", "A", "B", "C")))

    found = programs.backward(closing, case, setting, given)
    expected = programs.backward(own("xla"), case, setting, given).values()
    for name, x in found.values().items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-5)
    assert found.saved_bytes == 0  # operands alone


def test_numbers_in_tables():
    assert [digits(x) for x in (0.00123456, 0.8149, 40.17, 1234.5, 23456.7, 1e-5)] == [
        "0.001235", "0.8149", "40.17", "1234", "23457", "1.00e-05",
    ]  # fmt: skip
    assert [memory(x) for x in (None, 0, 1023, 151_000_000, 9_660_000_000)] == [
        "", "0 B", "1023 B", "144.0 MiB", "9212.5 MiB",
    ]  # fmt: skip
