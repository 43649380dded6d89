"""Other projects' scans in `python -m storm_kernels.ablate`: they get the problem that ours get."""

import sys
import types

import pytest

from storm_kernels.ablation import implementations, peers, run
from storm_kernels.ablation.operands import Setting
from storm_kernels.ablation.shapes import Shape
from storm_kernels.selective_scan import selective_scan
from tests.kernels.ablate_command import CPU, compile_quickly

SMALL = Shape(2, 12, 37, 3)


@pytest.fixture(autouse=True)
def quick_compile(monkeypatch):
    compile_quickly(monkeypatch)


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
