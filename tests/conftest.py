"""Eight simulated CPU devices, strict shapes and full precision for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags as absl_flags  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def _parsed_flags():
    # Grain's worker processes read absl flags.
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS(["pytest"], known_only=True)
