"""Eight simulated CPU devices, full precision and quick compilation for every test."""

import os

from tests.compilation import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", *QUICK)
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def _parsed_flags():
    # Grain's worker processes read absl flags.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"], known_only=True)
