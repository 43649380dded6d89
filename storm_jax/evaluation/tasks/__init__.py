"""The benchmarks: one file each. A new one is a file here with `TASKS`, a tuple of `Task`."""

import importlib
import pkgutil

from storm_jax.evaluation.items import TaskError
from storm_jax.evaluation.task import Task


def all_tasks() -> dict[str, Task]:
    """Every task by its name, from all files of this folder."""
    tasks: dict[str, Task] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for task in importlib.import_module(f"{__name__}.{module.name}").TASKS:
            assert task.name not in tasks, f"two tasks are called {task.name}"
            tasks[task.name] = task
    return tasks


def named(names: str) -> list[Task]:
    """The tasks of a list such as "videomme,mlvu_dev".

    Raises:
      TaskError: an unknown name; the message lists those there are.
    """
    known = all_tasks()
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise TaskError(
            f"no task {', '.join(map(repr, unknown)) or 'is named'}; there are {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(wanted)]
