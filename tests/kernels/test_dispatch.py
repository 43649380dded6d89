"""Which implementation serves a call: by name, by the platform, and what is said if it cannot."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from storm_kernels.platforms import platform_of
from storm_kernels.selective_scan import dispatch, selective_scan
from storm_kernels.selective_scan.checks import checked_call
from tests.kernels.scan_cases import inputs


def traced(case, then, platform=None):
    """The result of `then` on the checked call of a case, while it is traced for a platform."""
    seen = []

    def program(case):
        given = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "segment_ids")) | case
        call = checked_call(
            **given, delta_softplus=False, reverse=False, layout="bld", chunk_size=None,
            output_dtype=None,
        )  # fmt: skip
        seen.append(then(call))

    if platform is None:
        jax.eval_shape(program, case)
    else:
        with jax.sharding.use_abstract_mesh(abstract_mesh(platform)):
            jax.eval_shape(program, case)
    return seen[0]


def chosen(name, case=None, platform=None):
    case = inputs(optional=False) if case is None else case
    return traced(case, lambda call: dispatch.implementation_for(call, name).name, platform)


def abstract_mesh(platform):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    return jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)


@pytest.fixture
def kernel(monkeypatch):
    """Stands for both kernels; `reason` is what `unsupported` says."""
    kernel = types.SimpleNamespace(reason=None)

    def load(name):
        if name not in ("pallas_tpu", "triton_gpu"):
            return real(name)
        return dispatch.Implementation(name, lambda call: None, lambda call: kernel.reason)

    real = dispatch.load
    monkeypatch.setattr(dispatch, "load", load)
    return kernel


@pytest.mark.parametrize(
    ("platform", "name"),
    [("tpu", "pallas_tpu"), ("gpu", "triton_gpu"), ("cuda", "triton_gpu"), ("cpu", "xla")],
)
def test_none_takes_the_kernel_of_the_platform_of_the_mesh_in_force(platform, name, kernel):
    assert chosen(None, platform=platform) == name
    assert chosen(None) == "xla"


def test_an_operands_own_mesh_counts_without_one_in_force():
    sharding = jax.NamedSharding(abstract_mesh("tpu"), jax.P("x"))
    aval = jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=sharding)
    seen = []
    jax.eval_shape(lambda x: seen.append(platform_of(x)), aval)
    assert seen == ["tpu"]


@pytest.mark.parametrize("device", ["tpu", types.SimpleNamespace(platform="cuda")])
def test_the_default_device_counts_without_a_mesh(device, monkeypatch):
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_default_device=device))
    assert platform_of(jnp.zeros(2)) == ("tpu" if device == "tpu" else "gpu")


def test_none_falls_back_to_xla_and_says_why(kernel):
    kernel.reason = "it was not asked nicely"
    with pytest.warns(UserWarning, match="takes 'xla', not 'pallas_tpu': it was not asked"):
        assert chosen(None, platform="tpu") == "xla"


def test_float64_is_served_by_xla_everywhere_and_without_a_warning(kernel, recwarn):
    with jax.enable_x64(True):
        assert chosen(None, inputs(dtype=float, optional=False), "tpu") == "xla"
    assert not recwarn


def test_a_kernel_asked_for_by_name_says_why_it_does_not_serve(kernel):
    kernel.reason = "it was not asked nicely"
    with pytest.raises(
        ValueError, match="'triton_gpu' does not serve this call: it was not.*'xla'"
    ):
        selective_scan(**inputs(), implementation="triton_gpu")
    kernel.reason = None
    assert chosen("triton_gpu") == "triton_gpu"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'cuda' does not exist; there are 'reference', 'xla', 'p"):
        selective_scan(**inputs(), implementation="cuda")


def test_nothing_but_jax_is_imported_until_a_kernel_is_chosen():
    program = (
        "import sys, jax.numpy as jnp\n"
        "import storm_kernels.selective_scan as s, storm_kernels.causal_conv1d\n"
        "x = jnp.ones((1, 2, 3)); s.selective_scan(x, x, x[0, :3].T, x[..., :2], x[..., :2])\n"
        "print([m for m in sys.modules if 'jax_triton' in m or 'pallas' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
