"""`python -m storm_kernels.ablate --platform=tpu:v5e` without a TPU: bundles counted."""

import importlib.util

import jax
import pytest

from storm_kernels import ablate, tpu_cost
from storm_kernels.ablation import floors, static
from tests.kernels.ablate_command import CPU, command, records, user_file


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
@pytest.mark.exhaustive
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
