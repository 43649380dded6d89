"""Tokens of a row alone, through the kernel for their attention in the emulator, and without it."""

import pytest

from storm_kernels.token_attention import gpu
from tests.inference.test_linear import Case, exhaustive, off
from tests.kernels.gpu_emulation import emulated_gpu, recorded_launches  # noqa: F401

pytest.importorskip("triton")


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda: None)


@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(family, marks=exhaustive) for family in ("gemma2", "qwen2"))],
)
def test_the_kernel_changes_nothing_but_roundings(family, emulated_gpu, request):  # noqa: F811
    exact = Case(family, dtype="float32", head_dim=64).scores()
    plain = Case(family, head_dim=64).scores()
    request.getfixturevalue("served")
    fused = Case(family, head_dim=64).scores()
    assert (fused != plain).any()
    assert off(fused, exact) < 1.2 * off(plain, exact)
    assert off(plain, exact) < 0.1


@pytest.mark.usefixtures("served")
def test_where_it_is_taken():
    """In every layer, of one row alone, where heads have channels that it takes."""

    def launches(**given):
        with recorded_launches() as found:
            Case("gemma3", **given).scores(trace=True)
        return [(launch.name, launch.grid[0]) for launch in found]

    parts, whole = "token_attention_parts", "token_attention_whole"
    assert launches(head_dim=64) == 5 * 2 * [(parts, 2), (whole, 4)]
    # A device has a key-value head.
    assert launches(head_dim=64, devices=2) == 5 * 2 * [(parts, 1), (whole, 2)]
    assert not launches(head_dim=64, rows=2)
    assert not launches(head_dim=64, dtype="float32")
    assert not launches()
