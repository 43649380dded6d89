"""Which topologies are known, and what is said of the others."""

import importlib.util

import pytest

from storm_jax.aot.topology import describe
from storm_jax.config import ConfigError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.parametrize(
    "name,slices,devices,sizes,kind,usable",
    [
        ("v4:4x4x4", 1, 64, (4, 4, 4), "TPU v4", 30.75),
        ("v5e:16x16", 1, 256, (16, 16), "TPU v5 lite", 15.75),
        ("v5p:8x8x8", 1, 512, (8, 8, 8), "TPU v5", 95.74),
        ("v6e:16x16", 2, 512, (16, 16), "TPU v6 lite", 31.25),
    ],
)
def test_tpu_pods(name, slices, devices, sizes, kind, usable):
    topology = describe(name, slices)
    assert len(topology.devices) == devices and topology.sizes == sizes
    assert topology.devices[0].device_kind == kind
    assert topology.chip.device_kinds[0] == kind or kind.startswith(topology.chip.device_kinds)
    assert {topology.slice_of(d) for d in topology.devices} == set(range(slices))
    # What the compiler gives a program is close to what the data sheet says.
    assert topology.available_bytes == pytest.approx(usable * 2**30, rel=2e-3)
    assert 0.95 < topology.available_bytes / topology.chip.hbm_bytes < 1.02


@needs_libtpu
def test_a_slice_that_does_not_exist_lists_those_that_do():
    with pytest.raises(ConfigError) as error:
        describe("v5p:3x3x3")
    assert "v5p:4x4x4" in str(error.value) and "v5e:16x16" in str(error.value)
    for name in str(error.value).split("among others, ")[1].split(";")[0].split(", "):
        describe(name)


@needs_libtpu
def test_a_slice_larger_than_a_pod():
    with pytest.raises(ConfigError, match="largest slice of v6e has 256"):
        describe("v6e:32x32")


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:", "v5p:8,8", "TPU", "h100:8 x4"])
def test_a_name_that_is_not_understood(name):
    with pytest.raises(ConfigError, match="v5p:8x8x8 or h100:8x4"):
        describe(name)


@pytest.mark.parametrize("name,slices", [("h100:8x4", 2), ("h100:8x4x2", 1), ("h200:16", 1)])
def test_gpus_that_do_not_exist(name, slices):
    with pytest.raises(ConfigError, match=f"topology={name}"):
        describe(name, slices)


def test_simulated_devices_stand_in_for_gpus():
    if importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("the CUDA compiler is installed")
    topology = describe("h200:4x2")
    assert "simulated" in topology.compiler and topology.platform == "cpu"
    assert [topology.slice_of(d) for d in topology.devices] == [0] * 4 + [1] * 4
    with pytest.raises(ConfigError, match="32 simulated CPU devices"):
        describe("h200:8x4")  # here JAX has started with eight
