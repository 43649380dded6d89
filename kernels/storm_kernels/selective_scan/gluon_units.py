"""Device functions of the GPU scan, in Gluon: a sequence cut into units that follow each other.

A program that walked through a whole sequence would leave multiprocessors idle: 576 programs on
528 places make two rounds, the second nearly empty (measured: 1.7 times the time). So a sweep is
cut into units of some tiles. Programs take them from a counter, all rows' first units before any
second one, wait until the row's unit before is done and go on from the state that it left. The
counter makes this safe whatever order the hardware starts programs in: the unit that a program
waits for was taken before its own, by a program that is running or done.

`progress` is int32 [1 + rows], zero at the start: units taken, and units done of each row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton 3.9 renamed it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def take_unit(progress, ROWS: gl.constexpr, UNITS: gl.constexpr):
    """The row that this program works on, and which of the row's units."""
    row = gl.program_id(0)
    # Zero, but Triton 3.6 must not know: it fails on copies that are plainly never made.
    unit = gl.program_id(2)
    if UNITS > 1:
        ticket = gl.atomic_add(progress, 1, sem="relaxed")
        # ROWS is a constant: as the number of programs over UNITS it spills 8 bytes more.
        row = ticket % ROWS
        unit = ticket // ROWS
    return row, unit


@gluon.jit
def await_turn(progress, row, unit, UNITS: gl.constexpr):
    """Returns when the row's units before this one are done."""
    if UNITS > 1:
        done = unit * 0
        while done < unit:
            done = gl.atomic_add(progress + 1 + row, 0, sem="acquire")


@gluon.jit
def finish_unit(progress, row, UNITS: gl.constexpr):
    """Lets the row's next unit see everything that this program has stored."""
    if UNITS > 1:
        barrier()
        gl.atomic_add(progress + 1 + row, 1, sem="release")


@gluon.jit
def entering_state(state_in, state_out, place, mask, unit, UNITS: gl.constexpr):
    """The state that the sequence starts with or that the unit before left in `state_out`."""
    state = gl.load(state_in + place, mask=mask & (unit == 0), other=0.0)
    if UNITS > 1:
        left = gl.load(state_out + place, mask=mask & (unit > 0), other=0.0, cache_modifier=".cg")
        state = gl.where(unit > 0, left, state)
    return state
