"""`python -m storm_kernels.ablate`: its parts, the command in this process, and as users run it."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from storm_kernels import ablate, tpu_cost
from storm_kernels.ablation import (
    errors,
    floors,
    implementations,
    peers,
    programs,
    run,
    static,
    timing,
)
from storm_kernels.ablation.operands import OPTIONAL, Setting, cotangents, operands
from storm_kernels.ablation.report import digits, memory
from storm_kernels.ablation.shapes import SETS, Shape, parse_shape
from storm_kernels.selective_scan import selective_scan
from storm_kernels.selective_scan.shapes import default_chunk
from tests.kernels.scan_cases import QUICK_COMPILE
from tests.kernels.scan_oracle import oracle

ROOT = Path(__file__).parents[2]
SMALL = Shape(2, 12, 37, 3)
CPU = jax.devices("cpu")[0]
PLOTS = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(autouse=True)
def quick_compile(monkeypatch):
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: compile_(self, QUICK_COMPILE))


def command(capsys, *arguments):
    """Exit status, standard output and standard error."""
    status = ablate.main([*arguments, "--repeats=2", "--seconds=0.01"])
    return status, *capsys.readouterr()


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def user_file(tmp_path, body):
    path = tmp_path / "mine.py"
    head = """
        import jax
        import jax.numpy as jnp
        from storm_kernels.selective_scan import selective_scan
        def right(*args, **kwargs):
            return selective_scan(*args, **kwargs, implementation="xla")
    """
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return path


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


def test_a_program_that_does_not_fit_is_not_started(monkeypatch, capsys):
    monkeypatch.setattr(programs, "free_bytes", lambda device: 1000)
    arguments = ("--shape=1,4,64", "--dtype=f32", "--direction=forward")
    status, out, _ = command(capsys, *arguments, "--implementation=xla")
    assert status == 1 and "NOT RUN: needs 0.0 GiB of memory" in out
    status, out, _ = command(capsys, *arguments)  # nobody asked for it by name
    assert status == 0 and "NOT RUN" in out


# --------------------------------------------------------------------------------- the command here


def test_table_json_lines_and_plot(capsys, tmp_path):
    out = tmp_path / "new" / "folder"
    status, text, progress = command(
        capsys, "--shape=2,12,37,3,2", "--dtype=f32",
        "--implementation=reference,xla", "--optional=z,D,bias,softplus,segments,state",
        "--reverse", f"--out={out}",
    )  # fmt: skip
    assert status == 0, text
    found = records(out)
    assert [(r["implementation"], r["direction"]) for r in found] == [
        (i, d) for i in ("reference", "xla") for d in ("forward", "backward")
    ]
    for record in found:
        times = record["timing"]
        assert 0 < times["best"] <= times["quartile_1"] <= times["median"] <= times["quartile_3"]
        assert record["status"] == "ok" and record["platform"] == "cpu" and record["device"]
        assert record["versions"]["jax"] == jax.__version__
        assert record["shape"]["groups"] == 2 and record["setting"]["reverse"]
        assert set(record["errors"]) == (
            {"y", "h"}
            if record["direction"] == "forward"
            else {"du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial_state"}
        )
        assert 0 < max(record["errors"].values()) < 2e-6
        assert record["memory"]["peak"] > 0
        assert (record["saved_bytes"] is not None) == (record["direction"] == "backward")
        assert record["floor"] is None and record["share_of_floor"] is None  # a CPU has none
    lines = [line for line in text.splitlines() if line.startswith("B2 E12 L37 G3 K2")]
    assert len(lines) == 4 and (out / "table.txt").read_text().rstrip().endswith(lines[-1])
    header = next(line for line in text.splitlines() if line.startswith("shape"))
    column = header.index("implementation")
    assert {line[column:].split()[0] for line in lines} == {"reference", "xla"}
    assert "floor" not in header
    assert progress.count("[") == 4 and "[4/4]" in progress
    if PLOTS:
        png = (out / "times.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5000
    else:
        assert "no plot: matplotlib is not installed" in progress
    # A second run adds to the records and says when it began.
    again = ("--shape=1,2,3", "--dtype=f16", "--direction=both", "--implementation=xla")
    assert command(capsys, *again, f"--out={out}")[0] == 0
    assert len(records(out)) == 5 and records(out)[-1]["setting"]["dtype"] == "f16"


def test_what_cannot_run_here_is_named_with_its_reason(capsys):
    status, out, _ = command(capsys, "--shape=1,4,9", "--dtype=f32")
    assert status == 0
    assert "pallas_tpu: needs a TPU" in out and "--platform=tpu:v5e" in out
    assert "triton_gpu: needs an NVIDIA GPU" in out
    if importlib.util.find_spec("mamba_ssm") is None:
        assert "mamba_ssm: not installed" in out
    status, out, _ = command(capsys, "--shape=1,4,9", "--dtype=f32", "--implementation=triton_gpu")
    assert status == 1 and out.count("NOT RUN: needs an NVIDIA GPU") == 2


def test_quick_and_limits_cut_the_shapes(capsys, tmp_path):
    status, _, _ = command(
        capsys, "--shapes=mamba_ssm_tests", "--shape=1,4,9", "--limit-length=8", "--dtype=bf16",
        "--implementation=xla", "--direction=forward", f"--out={tmp_path}",
    )  # fmt: skip
    shapes = [record["shape"] for record in records(tmp_path)]
    assert status == 0 and [s["length"] for s in shapes] == [8, 8, 8]
    assert [(s["groups"], s["inputs"]) for s in shapes] == [
        (1, "mamba_ssm"), (2, "mamba_ssm"), (None, "model"),
    ]  # fmt: skip


def test_a_user_implementation_is_a_row(capsys, tmp_path):
    path = user_file(
        tmp_path,
        """
        def mine(u, delta, A, B, C, D, z, delta_bias, delta_softplus=False):
            if not delta_softplus:
                raise ValueError("only with softplus")
            dt = jax.nn.softplus(delta.astype(jnp.float32) + delta_bias)
            def step(h, x):
                u, dt, B, C = x
                h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
                return h, (h * C[:, None]).sum(-1)
            h = jnp.zeros((u.shape[0], *A.shape))
            time_first = [jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (u, dt, B, C)]
            y = jnp.moveaxis(jax.lax.scan(step, h, time_first)[1], 0, 1)
            return ((y + D * u) * jax.nn.silu(z.astype(jnp.float32))).astype(u.dtype)
        mine = jax.jit(mine, static_argnames="delta_softplus")
        """,
    )
    status, out, _ = command(
        capsys, "--shape=2,12,21,3", "--dtype=bf16", f"--implementation=xla,{path}:mine",
        f"--out={tmp_path}",
    )  # fmt: skip
    assert status == 0, out
    mine = [r for r in records(tmp_path) if r["implementation"] == "mine.py:mine"]
    assert [r["direction"] for r in mine] == ["forward", "backward"]
    assert all(0 < max(r["errors"].values()) < 1e-2 for r in mine)
    # It has no parameter for segments: the case that needs one fails, in words.
    status, out, _ = command(
        capsys, "--shape=1,4,9", "--dtype=f32", f"--implementation={path}:mine",
        "--optional=z,D,bias,softplus,segments",
    )  # fmt: skip
    assert status == 1 and out.count("mine.py:mine has no parameter segment_ids") == 2


def test_wrong_results_are_flagged(capsys, tmp_path):
    path = user_file(
        tmp_path,
        """
        def forward_off(*args, **kwargs):
            return right(*args, **kwargs).at[:, -1, -1].multiply(1.5)

        def gradient_off(u, *args, **kwargs):
            # The right value, and a gradient for u that is one percent too large.
            return right(1.01 * u - 0.01 * jax.lax.stop_gradient(u), *args, **kwargs)

        def nan(*args, **kwargs):
            return right(*args, **kwargs).at[0, 0, 0].set(jnp.nan)

        def short(*args, **kwargs):
            return right(*args, **kwargs)[:, 1:]

        def wide(*args, **kwargs):
            return right(*args, **kwargs, output_dtype=jnp.float32)
        """,
    )
    given = ",".join(f"{path}:{name}" for name in ("forward_off", "gradient_off", "nan", "short"))
    arguments = ("--shape=1,12,21,3", f"--out={tmp_path}")
    status, out, _ = command(capsys, *arguments, "--dtype=f32", f"--implementation={given}")
    assert status == 1
    status, _, _ = command(capsys, *arguments, "--dtype=bf16", f"--implementation={path}:wide")
    assert status == 0
    rows = {
        (r["implementation"].split(":")[1], r["setting"]["dtype"], r["direction"]): r
        for r in records(tmp_path)
    }
    assert {key: r["status"] for key, r in rows.items() if key[1] == "f32"} == {
        ("forward_off", "f32", "forward"): "wrong",
        ("forward_off", "f32", "backward"): "wrong",
        ("gradient_off", "f32", "forward"): "ok",
        ("gradient_off", "f32", "backward"): "wrong",
        ("nan", "f32", "forward"): "wrong",
        ("nan", "f32", "backward"): "wrong",
        ("short", "f32", "forward"): "wrong",
        ("short", "f32", "backward"): "failed",
    }
    off = rows["gradient_off", "f32", "backward"]
    assert off["errors"]["du"] == pytest.approx(0.01, rel=0.1) and off["timing"]["median"] > 0
    assert off["message"] == "du above the tolerance of 0.0006"
    assert rows["wide", "bf16", "forward"]["message"] == "y is float32"
    assert rows["wide", "bf16", "forward"]["errors"]["y"] < 1e-5
    assert "WRONG: y above the tolerance of 0.0006" in out
    assert "y has shape (1, 20, 12)" in rows["short", "f32", "forward"]["message"]


def test_an_implementation_that_raises_is_a_row(capsys, tmp_path):
    path = user_file(
        tmp_path,
        """
        def raises(*args, **kwargs):
            raise RuntimeError("the answer\\nis not 42")

        def forward_only(*args, **kwargs):
            @jax.custom_jvp
            def scan(u):
                return right(u, *args[1:], **kwargs)
            @scan.defjvp
            def refuse(primals, tangents):
                raise NotImplementedError("no gradients here")
            return scan(args[0])

        def pair(*args, **kwargs):
            return right(*args, **kwargs), None
        """,
    )
    names = ",".join(f"{path}:{name}" for name in ("raises", "forward_only", "pair"))
    status, out, _ = command(
        capsys, "--shape=1,4,9", "--dtype=f32", f"--implementation={names},xla",
        f"--out={tmp_path}",
    )  # fmt: skip
    assert status == 1
    assert [(r["status"], r["message"]) for r in records(tmp_path)] == [
        ("failed", "RuntimeError: the answer is not 42"),
        ("failed", "RuntimeError: the answer is not 42"),
        ("ok", ""),
        ("failed", "NotImplementedError: no gradients here"),
        ("failed", "TypeError: expected y alone, the scan returned 2 results"),
        ("failed", "TypeError: expected y alone, the scan returned 2 results"),
        ("ok", ""),
        ("ok", ""),
    ]
    assert "FAILED: RuntimeError: the answer is not 42" in out

    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    status, out, _ = command(capsys, "--shape=1,4,9", "--dtype=f32", f"--implementation={broken}:f")
    assert status == 1 and "No module named 'nothing_of_this_name'" in out


def test_interrupting_keeps_what_was_measured(capsys, tmp_path):
    path = user_file(tmp_path, "def slow(*args, **kwargs):\n    raise KeyboardInterrupt\n")
    status, out, progress = command(
        capsys, "--shape=1,4,9", "--dtype=f32", f"--implementation=xla,{path}:slow",
        f"--out={tmp_path}",
    )  # fmt: skip
    assert status == 1 and "interrupted after 2 of 4 rows" in progress
    assert [r["implementation"] for r in records(tmp_path)] == ["xla", "xla"]
    assert out.count("B1 E4 L9 G16") == 2 and (tmp_path / "times.png").exists() == PLOTS


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--shapes=storm_5b", ["storm_5b", "storm_4b, storm_7b, mamba_ssm_tests"]),
        ("--shape=1,2", ["1,2", "batch,channels,length"]),
        ("--dtype=f64", ["f64", "bf16, f16, f32"]),
        ("--direction=sideways", ["sideways", "forward, backward, both"]),
        ("--optional=z,gate", ["gate", "z, D, bias, softplus, segments, state"]),
        ("--layout=ldb", ["ldb", "bld", "bdl"]),
        ("--platform=tpu:v9", ["tpu:v9", "v4, v5e, v5p, v6e"]),
        ("--platform=npu", ["npu", "cpu, gpu, tpu"]),
        ("--implementation=cuda", ["cuda", "reference, xla, pallas_tpu, triton_gpu", "file.py:"]),
        ("--implementation=none.py:f", ["none.py", "there is no file"]),
        (f"--implementation={__file__}:absent", ["absent", "user_file"]),
        ("--repeats=0", ["--repeats", "'0'"]),
        ("--seconds=-1", ["--seconds", "'-1'"]),
        ("--limit-length=1.5", ["--limit-length", "'1.5'"]),
    ],
)
def test_wrong_arguments_name_the_value_and_the_choices(capsys, argument, words):
    with pytest.raises(SystemExit) as exit_:
        ablate.main([argument])
    message = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2
    for word in words:
        assert word in message


def test_without_a_gpu_or_tpu_those_platforms_are_refused(capsys):
    for name, words in (("tpu", "JAX sees no TPU"), ("gpu", "JAX sees no GPU")):
        with pytest.raises(SystemExit) as exit_:
            ablate.main([f"--platform={name}"])
        assert exit_.value.code == 2 and words in capsys.readouterr().err


def test_numbers_in_tables():
    assert [digits(x) for x in (0.00123456, 0.8149, 40.17, 1234.5, 23456.7, 1e-5)] == [
        "0.001235", "0.8149", "40.17", "1234", "23457", "1.00e-05",
    ]  # fmt: skip
    assert [memory(x) for x in (None, 0, 1023, 151_000_000, 9_660_000_000)] == [
        "", "0 B", "1023 B", "144.0 MiB", "9212.5 MiB",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- peers


def plan(implementation, setting, shape=SMALL):
    return run.Plan([shape], [setting], [implementation], run.DIRECTIONS, CPU, 2, 0.01)


def torch_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """What mamba_ssm's `selective_scan_fn` computes, position by position, on any device."""
    import torch

    dt = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    dt = torch.nn.functional.softplus(dt) if delta_softplus else dt
    if B.dim() == 3:
        B, C = B[:, None], C[:, None]
    per_group = u.shape[1] // B.shape[1]
    B, C = (x.float().repeat_interleave(per_group, 1) for x in (B, C))
    h, ys = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h
        h = h + (dt[:, :, t] * u[:, :, t].float())[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u.float()
    return (y if z is None else y * torch.nn.functional.silu(z.float())).to(u.dtype)


@pytest.mark.parametrize("groups", [None, 2])
def test_mamba_ssm_is_given_the_same_problem(monkeypatch, groups):
    pytest.importorskip("torch")
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = torch_scan
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(peers, "missing", lambda name, platform: None)
    peer = implementations.peer("mamba_ssm", "gpu")
    shape = Shape(2, 12, 21, 3, groups)
    for optional in (("z", "D", "bias", "softplus"), ()) if groups is None else ((),):
        found = list(run.rows(plan(peer, Setting("f32", optional), shape), lambda label: None))
        assert [row.status for row in found] == ["ok"] * 3, [row.message for row in found]
        assert all(0 < max(row.errors.values()) < 1e-5 for row in found)
        assert all(row.timing.median > 0 and row.message == "in layout 'bdl'" for row in found)
        assert found[1].saved_bytes > 0 and found[0].saved_bytes is None
    (row, *_) = run.rows(plan(peer, Setting("f32", ("segments",))), lambda label: None)
    assert (row.status, row.message) == ("not run", "has no segments")


def test_ejkernel_is_given_the_same_problem(monkeypatch):
    def state_space_v1(x, A, B, C, D, dt, /, gate=None, initial_state=None, *, act_fn=None):
        assert (act_fn is None) == (gate is None)
        y, h = selective_scan(
            x, dt, A, B, C, D, z=gate, initial_state=initial_state, return_final_state=True,
            implementation="reference",
        )  # fmt: skip
        return y, h, None

    modules = types.ModuleType("ejkernel.modules")
    modules.state_space_v1 = state_space_v1
    monkeypatch.setitem(sys.modules, "ejkernel", types.ModuleType("ejkernel"))
    monkeypatch.setitem(sys.modules, "ejkernel.modules", modules)
    monkeypatch.setattr(peers, "missing", lambda name, platform: None)
    peer = implementations.peer("ejkernel", "cpu")
    for optional in (("z", "D", "bias", "softplus", "state"), ()):
        found = list(run.rows(plan(peer, Setting("f32", optional)), lambda label: None))
        assert [row.status for row in found] == ["ok"] * 3, [row.message for row in found]
        assert all(0 < max(row.errors.values()) < 1e-5 for row in found)
    (row, *_) = run.rows(plan(peer, Setting("f32"), Shape(1, 4, 9, 3, 2)), lambda label: None)
    assert (row.status, row.message) == ("not run", "has no groups")


# ----------------------------------------------------------------------------- static cost on TPUs


def kernel(name, **slots):
    """A compiled kernel: a grid loop around a loop of four trips, which has these slots."""
    full = dict.fromkeys(tpu_cost.UNITS, 0) | slots
    outer = tpu_cost.Loop(0, 3072, full | {"bundle": 3072}, None)
    inner = tpu_cost.Loop(100, 1892, full | {"bundle": 1792}, 4)
    capacity = {"VALU": 4, "EUP": 1}
    return tpu_cost.Kernel(name, 6000, capacity, full, (outer, inner))


def test_static_cost_of_a_users_kernel(monkeypatch, capsys, tmp_path):
    compiled = []

    def compile_and_count(program, topology):
        function, arguments = user_program_of(program)
        compiled.append((topology, jax.eval_shape(function, *arguments)))
        copy = kernel("copy")
        mine = {"EUP": 1024, "VALU": 6656, "XLU": 512, "VLOAD": 256, "VSTORE": 128}
        return [copy, kernel("mine", **mine, **{"VSTORE:SPILL": 2}), copy]

    def user_program_of(program):
        scope = {"sharding": jax.sharding.SingleDeviceSharding(CPU)}
        exec(program, scope)
        return scope["function"], scope["arguments"]

    monkeypatch.setattr(tpu_cost, "compile_and_count", compile_and_count)
    static._compiled_of_user.cache_clear()
    monkeypatch.setattr(static, "require_libtpu", lambda: None)
    path = user_file(tmp_path, "")
    status, out, _ = command(
        capsys, "--platform=tpu:v5e", "--shape=1,2048,3000", "--dtype=bf16",
        f"--implementation={path}:right,xla", "--optional=z,D,bias,softplus,state",
        f"--out={tmp_path}",
    )  # fmt: skip
    forward, backward, *others = records(tmp_path)
    # xla was asked for by name and has nothing to count.
    assert status == 1
    assert {(r["implementation"], r["status"]) for r in others} == {("xla", "not run")}
    assert [topology for topology, _ in compiled] == ["v5e", "v5e"]
    shapes = [jax.tree.map(lambda x: x.shape, found) for _, found in compiled]
    assert shapes[0] == {"y": (1, 1024, 2048), "h": (1, 2048, 16)}
    assert set(shapes[1]) == {
        "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state",
    }  # fmt: skip
    cost = forward["static"]
    # 1792 bundles for 1024 exponentials; 3000 positions of two blocks of channels, 16 states.
    assert cost["bundles"] == cost["recurrence"] == 1.75
    assert cost["spills"] == 2 and cost["kernel"] == "mine"
    assert cost["slots"] == {"VALU": 6.5, "EUP": 1.0, "XLU": 0.5, "load": 0.25, "store": 0.125}
    assert cost["ms"] == pytest.approx(3000 * 2 * 16 * 1.75 / 1.5e6)
    assert cost["resource"] == "issue" and forward["timing"] is None
    assert forward["floor"]["resource"] == "VALU"
    assert forward["share_of_floor"] == pytest.approx(7 / 4 / 1.75)
    # Backward, seven float tensors of bfloat16 and the saved states take longer at 819 GB/s.
    assert backward["static"]["bundles"] == 1.75 and backward["static"]["resource"] == "HBM"
    assert "issue" in out and "the hot loop of mine alone" in out

    monkeypatch.setattr(tpu_cost, "compile_and_count", lambda *x: [kernel("copy")])
    static._compiled_of_user.cache_clear()
    status, out, _ = command(
        capsys, "--platform=tpu:v5e", "--shape=1,2048,64", f"--implementation={path}:right"
    )
    assert status == 1 and "NOT RUN: compiles to no Pallas kernel with exponentials" in out


def test_static_cost_needs_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(static.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        ablate.main(["--platform=tpu:v5e"])
    assert exit_.value.code == 2 and "pip install 'storm_jax[tpu]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("generation", floors.TPU_GENERATIONS)
def test_static_cost_of_the_kernels(capsys, tmp_path, generation):
    path = user_file(
        tmp_path,
        """
        def pallas(*args, **kwargs):
            return selective_scan(*args, **kwargs, implementation="pallas_tpu")
        """,
    )
    status, out, _ = command(
        capsys, f"--platform=tpu:{generation}", "--shape=1,2304,65536", "--dtype=bf16",
        f"--implementation=pallas_tpu,{path}:pallas", f"--out={tmp_path}",
    )  # fmt: skip
    assert status == 0, out
    rows = records(tmp_path)
    assert [(r["implementation"], r["direction"]) for r in rows] == [
        (i, d) for i in ("pallas_tpu", "mine.py:pallas") for d in ("forward", "backward")
    ]
    for record in rows:
        cost = record["static"]
        # Fewer bundles than its slots need cannot be.
        slots = 2 if generation == "v4" else 4
        assert cost["bundles"] >= max(cost["slots"]["VALU"] / slots, cost["slots"]["EUP"])
        if record["implementation"] == "pallas_tpu":
            useful = 7 if record["direction"] == "forward" else 18
            assert cost["slots"]["VALU"] >= useful - 0.5 and cost["bundles"] > cost["recurrence"]
        assert cost["ms"] == max(cost["by_resource"].values())
        assert cost["resource"] in ("issue", "VALU", "EUP", "HBM")
        assert record["device"] == f"{generation}, static cost"
    # The same kernel, as a user's: its hot loop is the recurrence.
    own, mine = rows[0]["static"], rows[2]["static"]
    assert mine["bundles"] == pytest.approx(own["recurrence"], rel=0.1)


# ---------------------------------------------------------------------------------- as users run it


def python(*arguments, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )


def test_the_command(tmp_path):
    done = python(
        "-m", "storm_kernels.ablate", "--shape=1,4,9", "--dtype=f32", "--repeats=2",
        "--seconds=0.01", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("B1 E4 L9 G16") == 4
    assert {r["implementation"] for r in records(tmp_path)} >= {"reference", "xla"}
    assert (tmp_path / "times.png").exists() == PLOTS
    wrong = python("-m", "storm_kernels.ablate", "--dtype=f64")
    assert wrong.returncode == 2 and "'f64' is none of bf16, f16, f32" in wrong.stderr


def test_importing_the_command_needs_jax_alone():
    code = (
        "import sys, storm_kernels.ablate;"
        "bad = {'torch', 'matplotlib', 'triton', 'mamba_ssm', 'ejkernel'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
