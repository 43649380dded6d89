"""Compiled programs are found again by a second process."""

import subprocess
import sys
from pathlib import Path

from tests.compilation import without_shared_cache

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import jax
from storm_jax.training import compile_cache
compile_cache.enable(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3)).block_until_ready()
print(events.count("/jax/compilation_cache/cache_hits"))
"""


def hits(folder: Path, **variables: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)],
        env={**without_shared_cache(), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_second_process_compiles_nothing(tmp_path):
    assert hits(tmp_path / "a") == 0
    assert list((tmp_path / "a").iterdir())
    assert hits(tmp_path / "a") > 0


def test_jax_has_a_variable_for_another_folder(tmp_path):
    assert hits(tmp_path / "a", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "b")) == 0
    assert not (tmp_path / "a").exists() and list((tmp_path / "b").iterdir())
