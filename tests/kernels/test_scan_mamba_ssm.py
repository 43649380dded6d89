"""mamba_ssm's own test of its scan, at its tolerances, with what it has commented out turned on.

B=2, D=4, N=8; A=-0.5 rand, delta and its bias 0.5 rand, the rest normal; softplus. Its lengths,
groups and dtypes, all optional operands on and off, values and gradients, against float64.
"""

import itertools

import pytest

from tests.kernels import scan_suite

LENGTHS = (8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096)
SOME_LENGTHS = (8, 128, 372, 1134, 4096)
CI_LENGTHS = (372, 4096)  # neither whole chunks nor few of them
DTYPES = ("float32", "float16", "bfloat16")
# Run every time: both groups and all dtypes at one length, a short and a long one.
QUICK = {(128, d, g, o) for d in DTYPES for g, o in ((2, True), (1, False))}
QUICK |= {(8, "float32", 1, True), (1134, "bfloat16", 1, True)}


def cases():
    found = []
    for case in itertools.product(LENGTHS, DTYPES, (1, 2), (True, False)):
        length, dtype, groups, optional = case
        if dtype != "float32" and length not in SOME_LENGTHS:
            continue
        # CI leaves out what only joins two things that are there one by one.
        one_by_one = length in CI_LENGTHS and (groups, optional) in ((2, True), (1, False))
        marks = [pytest.mark.slow] * (case not in QUICK)
        if marks and not one_by_one:
            marks.append(pytest.mark.exhaustive)
        found.append(pytest.param(*case, marks=marks))
    return found


@pytest.mark.parametrize("implementation", scan_suite.FAST)
@pytest.mark.parametrize(("length", "dtype", "groups", "optional"), cases())
def test_the_case_of_mamba_ssm(implementation, length, dtype, groups, optional):
    scan_suite.mamba_ssm(implementation, length, dtype, groups, optional, seed=length)
