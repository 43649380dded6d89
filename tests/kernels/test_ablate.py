"""`python -m storm_kernels.ablate`, in this process and as users run it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from storm_kernels import ablate
from storm_kernels.ablation import programs
from tests.kernels.ablate_command import command, compile_quickly, records, user_file

ROOT = Path(__file__).parents[2]
PLOTS = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(autouse=True)
def quick_compile(monkeypatch):
    compile_quickly(monkeypatch)


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
    quick = ablate._shapes(ablate._parser().parse_args(["--quick"]))
    assert {shape.length for shape in quick} == {128}
    assert max(shape.batch for shape in quick) == 2 and {s.channels for s in quick} >= {2304, 7168}
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


def test_a_program_that_does_not_fit_is_not_started(monkeypatch, capsys):
    monkeypatch.setattr(programs, "free_bytes", lambda device: 1000)
    arguments = ("--shape=1,4,64", "--dtype=f32", "--direction=forward")
    status, out, _ = command(capsys, *arguments, "--implementation=xla")
    assert status == 1 and "NOT RUN: needs 0.0 GiB of memory" in out
    status, out, _ = command(capsys, *arguments)  # nobody asked for it by name
    assert status == 0 and "NOT RUN" in out


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
