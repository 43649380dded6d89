"""Grid points side by side: processes that share one device, because compiling takes longest."""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from storm_jax.evidence_grid.recipe import Recipe
from storm_jax.evidence_grid.results import Folder

_SHARE = 0.92  # of the device's memory, over all processes


def run_all(
    recipes: Sequence[Recipe], data: str, out: str, workers: int, cache: str, kind: str
) -> list[str]:
    """Does what is missing of "runs" or "timing"; returns what failed, one text a point.

    Args:
      data: folder that `clips.prepare` filled.
      workers: processes; times are only true with one.
      cache: folder of compiled programs.
      kind: "runs" or "timing".

    Raises:
      EvidenceError: a file is of another recipe.
    """
    folder = Folder(out)
    missing = [recipe for recipe in recipes if not folder.has(kind, recipe)]
    say(f"{kind}: {len(recipes) - len(missing)} of {len(recipes)} points are there already")
    if not missing:
        return []
    workers = min(workers, len(missing))
    # Read when JAX starts, in the processes.
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_SHARE / workers:.3f}"
    context = multiprocessing.get_context("spawn")
    failed, began = [], time.time()
    # A process a point: its memory on the device goes with it.
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = {
            pool.submit(_one, recipe, data, out, cache, kind): recipe.point.name
            for recipe in missing
        }
        for done, job in enumerate(as_completed(jobs), 1):
            try:
                job.result()
            except Exception as error:  # the other points go on; the command fails at the end
                failed.append(f"{jobs[job]}: {type(error).__name__}: {error}")
                say(f"FAILED {failed[-1]}")
            passed = time.time() - began
            left = passed / done * (len(missing) - done)
            say(f"{kind}: {done} of {len(missing)} done in {passed:.0f} s, about {left:.0f} s left")
    return failed


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _one(recipe: Recipe, data: str, out: str, cache: str, kind: str) -> None:
    # Here, so that the first process never starts JAX.
    from storm_jax.evidence_grid import timing
    from storm_jax.evidence_grid.point_run import PointRun
    from storm_jax.training import compile_cache

    compile_cache.enable(cache)
    name = recipe.point.name
    run = PointRun(recipe, data, lambda text: say(f"{name:<20} {text}"))
    found = run.result() if kind == "runs" else timing.measure(run)
    Folder(out).write(kind, name, found)
