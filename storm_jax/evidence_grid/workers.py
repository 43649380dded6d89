"""Grid points side by side: processes that share one device, because compiling takes longest."""

import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from storm_jax.evidence_grid.recipe import Recipe
from storm_jax.evidence_grid.results import Folder

# Compiling would take longer than training: XLA times dozens of kernels for each small product.
_QUICK = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
_SHARE = 0.92  # of the device's memory, over all processes


def run_all(recipes: Sequence[Recipe], data: str, out: str, workers: int) -> list[str]:
    """Trains and scores the points that have no result; returns what failed, one text a point.

    Args:
      data: folder that `clips.prepare` filled.
      out: folder of results; compiled programs are kept in it too.
      workers: processes.

    Raises:
      EvidenceError: a result is of another recipe.
    """
    folder = Folder(out)
    missing = [recipe for recipe in recipes if not folder.has(recipe)]
    say(f"{len(recipes) - len(missing)} of {len(recipes)} grid points are there already")
    if not missing:
        return []
    workers = min(workers, len(missing))
    # Read when JAX starts, in the processes.
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_SHARE / workers:.3f}"
    if shutil.which("nvidia-smi"):
        os.environ.setdefault("XLA_FLAGS", _QUICK)
    context = multiprocessing.get_context("spawn")
    failed, began = [], time.time()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = {pool.submit(_one, recipe, data, out): recipe for recipe in missing}
        for done, future in enumerate(as_completed(running), 1):
            name = running[future].point.name
            try:
                future.result()
            except Exception as error:  # the others go on; the command fails at the end
                failed.append(f"{name}: {type(error).__name__}: {error}")
                say(f"FAILED {failed[-1]}")
            passed = time.time() - began
            left = passed / done * (len(missing) - done)
            say(f"{done} of {len(missing)} points in {passed:.0f} s, about {left:.0f} s left")
    return failed


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _one(recipe: Recipe, data: str, out: str) -> None:
    # Tiny scans of several seeds: XLA takes all seeds at once. The GPU's kernels take a launch for
    # each, and longer to compile than a point to train.
    sys.modules["jax_triton"] = None  # pyrefly: ignore[unsupported-operation]
    warnings.filterwarnings("ignore", "selective_scan takes 'xla'")
    # Here, so that the first process never starts JAX.
    from storm_jax.evidence_grid.point_run import PointRun
    from storm_jax.training import compile_cache

    work = os.path.join(out, "work")
    compile_cache.enable(os.path.join(work, "compiled"))
    name = recipe.point.name
    began = time.time()
    found = PointRun(recipe, data, work, lambda text: say(f"{name:<22} {text}")).result()
    Folder(out).write(name, {**found, "seconds": round(time.time() - began, 1)})
