"""Counts of the published annotation files, where a machine has them.

STORM_BENCHMARKS names a folder with benchmarks below it; their videos are not needed.
"""

import os
from pathlib import Path

import pytest

from storm_jax.evaluation.items import TaskError
from storm_jax.evaluation.tasks import all_tasks

TASKS = all_tasks()


@pytest.mark.skipif("STORM_BENCHMARKS" not in os.environ, reason="STORM_BENCHMARKS is not set")
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.expected])
def test_the_full_set_is_recognised(name):
    try:
        items = TASKS[name].load(Path(os.environ["STORM_BENCHMARKS"]))
    except TaskError as error:
        if "holds no annotations" not in str(error):
            raise
        pytest.skip(str(error))
    assert TASKS[name].difference(items) == ""
    for item in items:
        for family in TASKS[name].families:
            assert TASKS[name].prompt(item, family).text.count("<video>") == 1
            if isinstance(item.answer, int):
                letter = item.letters[item.answer]
                assert TASKS[name].extract(letter, item, family) == item.answer
