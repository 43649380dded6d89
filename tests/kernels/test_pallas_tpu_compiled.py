"""The TPU kernels as libtpu compiles them, with no TPU: that it does, and what it makes of them."""

import importlib.util

import pytest

from storm_kernels import tpu_cost

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
pytestmark = [needs_libtpu, pytest.mark.slow]
GENERATIONS = tuple(tpu_cost.TOPOLOGIES)
exhaustive = pytest.mark.exhaustive
LONG = {"batch": 1, "length": 65536, "channels": 2304, "state": 16}
WIDE = {"batch": 1, "length": 32768, "channels": 7168, "state": 16}
SMALL_ODD = {"batch": 2, "length": 77, "channels": 130, "state": 5}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "sizes,dtype",
    [
        pytest.param(WIDE, "bfloat16", id="wide-bfloat16"),
        pytest.param(WIDE, "float32", id="wide-float32", marks=exhaustive),
        pytest.param(LONG, "bfloat16", id="long-bfloat16", marks=exhaustive),
        pytest.param(LONG, "float32", id="long-float32", marks=exhaustive),
        pytest.param(SMALL_ODD, "bfloat16", id="small-bfloat16", marks=exhaustive),
        pytest.param(SMALL_ODD, "float32", id="small-float32", marks=exhaustive),
    ],
)
def test_compiles_forward_and_backward(generation, dtype, sizes):
    program = tpu_cost.scan_program(**sizes, dtype=dtype, fused=True, backward=True)
    kernels = tpu_cost.compile_and_count(program, generation)
    assert {k.name for k in kernels} == {"selective_scan_forward", "selective_scan_backward"}
    assert len(kernels) == 2
    # Spans without padding or restarts spill nothing (below); the second form of their loops, which
    # the others take, spills up to 9 registers (the forward on a v6e).
    assert max(kernel.spills for kernel in kernels) <= 10


def cost(generation, fused, backward):
    program = tpu_cost.scan_program(
        batch=1, length=512, channels=7168, state=16, dtype="bfloat16", fused=fused,
        backward=backward, segments=False,
    )  # fmt: skip
    kernel = tpu_cost.scan_kernel(tpu_cost.compile_and_count(program, generation), backward)
    return tpu_cost.scan_cost(kernel, generation)


@exhaustive
def test_bundles_of_a_v4():
    """Two slots of the vector ALU, and one load a bundle: about twice the bundles of the others."""
    for fused, most in ((False, (4.9, 17.1)), (True, (5.8, 18.6))):
        forward, backward = cost("v4", fused, False), cost("v4", fused, True)
        assert forward.spills == backward.spills == 0
        assert 3.5 <= forward.recurrence < forward.bundles <= most[0]
        assert 10 <= backward.recurrence < backward.bundles <= most[1]
        assert forward.slots["VALU"] >= 6.9 and forward.slots["EUP"] >= 1.99
        assert backward.slots["VALU"] >= 20 and backward.slots["VSTORE"] >= 4


@exhaustive
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_forward_bundles(generation):
    plain, fused = cost(generation, False, False), cost(generation, True, False)
    assert 1.75 <= plain.recurrence <= 2.1
    assert plain.recurrence < plain.bundles < fused.bundles <= 2.5
    # What the mathematics needs: 7 vector instructions and one exponential.
    assert 6.9 <= plain.slots["VALU"] <= 7.5 and 0.99 <= plain.slots["EUP"] <= 1.01
    assert plain.spills == fused.spills == 0


@exhaustive
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_backward_bundles(generation):
    plain, fused = cost(generation, False, True), cost(generation, True, True)
    assert 5.0 <= plain.recurrence <= 6.0
    assert plain.recurrence < plain.bundles < fused.bundles <= 7.5
    # Nothing that the kernel stores may be dropped: states, and products of dB and dC.
    assert plain.slots["VSTORE"] >= 4
    # Two exponentials; 5 instructions for the states, 13 for the gradients, 2 sums over sublanes.
    assert plain.slots["VALU"] >= 20 and plain.slots["EUP"] >= 2
    assert plain.spills == fused.spills == 0


def test_a_program_that_cannot_be_compiled_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        tpu_cost.compile_and_count("1 / 0", "v5e", timeout=120)
