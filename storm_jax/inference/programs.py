"""Compiled programs by the sizes they are for; what is missing can be compiled beside what runs.

`jax.jit` compiles while its caller waits, and with it everything that the caller's thread does for
others. Here a thread of its own traces and compiles (XLA lets other threads go on meanwhile), and
the caller asks again later.
"""

import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

WAITED = "/storm_jax/waited_for_a_program"  # event of `jax.monitoring`, on the thread that waited
THREAD = "compiler"  # name of the thread beside

Make = Callable[[], jax.stages.Compiled]


class CompileError(RuntimeError):
    """A program could not be compiled; nothing has been run, and it is tried again when asked."""


class _Job(NamedTuple):
    """A program to compile."""

    name: str
    key: Hashable
    future: "Future[jax.stages.Compiled]"
    make: Make


class Programs:
    """The programs of one engine; methods may be called from any thread.

    Attributes:
      told: called when a program is ready or has failed, with its name and the seconds it took, on
        the thread that compiled it. It must not block.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._changed = threading.Condition()  # guards the three below
        self._made: dict[tuple[str, Hashable], _Job] = {}
        # One at a time: each is compiled by several threads of XLA's.
        self._todo: deque[_Job] = deque()
        self._busy = False  # a thread works on them
        self.told: Callable[[str, float], None] = lambda name, seconds: None

    def __len__(self) -> int:
        """Programs that are there, failed ones and those in the making included."""
        return len(self._made)

    def get(self, name: str, key: Hashable, make: Make) -> jax.stages.Compiled:
        """A program; compiles it, or waits for it, where it is missing.

        Raises:
          CompileError: XLA refuses it.
        """
        job, mine = self._claimed(name, key, make)
        if mine:
            self._compile(job)
        elif not job.future.done():
            began = time.perf_counter()
            concurrent.futures.wait([job.future])
            jax.monitoring.record_event_duration_secs(WAITED, time.perf_counter() - began)
        return self._result(job)

    def ahead(self, name: str, key: Hashable, make: Make) -> bool:
        """Whether `get` would not wait; if it would, compiling begins beside.

        A program that failed counts as there: `get` says why.
        """
        job, mine = self._claimed(name, key, make)
        if mine:
            with self._changed:
                self._todo.append(job)
                if not self._busy:
                    self._busy = True
                    threading.Thread(target=self._work, name=THREAD).start()
        return job.future.done()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when everything that `ahead` began has ended, or after some time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, seconds)

    def check(self) -> None:
        """Raises CompileError where a program could not be compiled; nobody need have called it."""
        with self._changed:
            made = list(self._made.values())
        for job in made:
            if job.future.done():
                self._result(job)

    def give_up(self) -> None:
        """What waits for its turn is not compiled; what is being compiled goes on to its end."""
        with self._changed:
            given_up = list(self._todo)
            self._todo.clear()
        for job in given_up:
            self._forget(job)
            job.future.set_exception(CompileError("nobody waited for it"))

    def _claimed(self, name: str, key: Hashable, make: Make) -> tuple[_Job, bool]:
        """A program, and whether the caller is the one to have it compiled."""
        with self._changed:
            missing = (name, key) not in self._made
            job = self._made.setdefault((name, key), _Job(name, key, Future(), make))
        return job, missing

    def _result(self, job: _Job) -> jax.stages.Compiled:
        """Of a job, when it has ended; one that failed is forgotten, to be tried again."""
        try:
            return job.future.result()
        except Exception as error:
            self._forget(job)
            raise CompileError(f"{job.name} {job.key}: {error}") from error

    def _forget(self, job: _Job) -> None:
        with self._changed:
            if self._made.get((job.name, job.key)) is job:
                del self._made[job.name, job.key]

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._todo:
                    self._busy = False
                    self._changed.notify_all()
                    return
                job = self._todo.popleft()
            self._compile(job)

    def _compile(self, job: _Job) -> None:
        began = time.perf_counter()
        try:
            with jax.set_mesh(self._mesh):
                program = job.make()
        except Exception as error:
            job.future.set_exception(error)
        else:
            job.future.set_result(program)
        self.told(job.name, time.perf_counter() - began)


class Family:
    """One function, compiled for each size that is asked for."""

    def __init__(
        self,
        programs: Programs,
        name: str,
        function: Any,
        arguments: Callable[..., tuple],
    ):
        """
        Args:
          function: of `jax.jit`.
          arguments: from sizes to what describes the function's arguments: arrays,
            `jax.ShapeDtypeStruct`, and values of static arguments.
        """
        self._programs, self._name = programs, name
        self._function, self._arguments = function, arguments

    def __call__(self, *sizes: Hashable) -> jax.stages.Compiled:
        """The program for these sizes; it takes the function's arguments but the static ones.

        Raises:
          CompileError: XLA refuses it.
        """
        return self._programs.get(self._name, sizes, lambda: self._made(*sizes))

    def ahead(self, *sizes: Hashable) -> bool:
        """Whether the program is there; see `Programs.ahead`."""
        return self._programs.ahead(self._name, sizes, lambda: self._made(*sizes))

    def _made(self, *sizes: Hashable) -> jax.stages.Compiled:
        return self._function.lower(*self._arguments(*sizes)).compile()


def described(tree: Any) -> Any:
    """Shapes, dtypes and places of arrays, for `Family`; the arrays themselves may be given up."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
