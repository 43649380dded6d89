"""What the compiled step holds on each device: no whole row where rows are split."""

import functools
import re

import jax
import pytest

from storm_jax.models.storm import StormModel
from tests.parallel.cases import FRAMES, LENGTH, objective, packed_rows, place, random_params
from tests.parallel.test_sequence import mesh_of
from tests.tiny import tiny_model

SEQ = 4
N, PATCHES, D, D_v, E = 4, 16, 32, 16, 64  # of the tiny model
F = 12  # FRAMES and padding
ROWS = 8


def whole_rows(model, sizes) -> set[str]:
    """Shapes in a device's program that hold whole rows: of tokens, patches or channels.

    Not of pixels: 11 frames cannot be placed split over 4 devices.
    """
    runs = [
        *((*positions, width) for positions in [(LENGTH,), (ROWS * LENGTH,)] for width in (D,)),
        *((positions, width) for positions in (F * N, ROWS * F * N) for width in (D, E, 2 * E)),
        *((frames, N, D) for frames in (FRAMES, F, ROWS * F)),
        *((frames, PATCHES, D_v) for frames in (FRAMES, F, ROWS * FRAMES, ROWS * F)),
    ]
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        args = place(model, random_params(model), packed_rows(model), mesh)
        step = jax.jit(jax.value_and_grad(functools.partial(objective, model)))
        text = step.lower(*args).compile().as_text()
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", text))
    assert len(shapes) > 100
    found = set()
    for shape in shapes:
        dims = [int(size) for size in shape.split(",")]
        for run in runs:
            both = (run, run[::-1])
            starts = range(len(dims) - len(run) + 1)
            if any(tuple(dims[i : i + len(run)]) in both for i in starts):
                found.add(shape)
    return found


@pytest.mark.slow
def test_no_device_holds_a_whole_row():
    # Sizes of parameters are none of those above.
    config = tiny_model(
        decoder=dict(layers=1, global_every=1, mlp=40, vocab_size=44), temporal=dict(layers=1)
    )
    model = StormModel(config)
    assert whole_rows(model, dict(tensor=2, data=4)), "the test finds nothing at all"
    assert not whole_rows(model, dict(seq=SEQ, tensor=2))
