"""Compiles the training step for a pod: `python -m storm_jax.compile --config=… --topology=v5p:8x8x8`.

No accelerator is needed: libtpu or XLA's CUDA compiler runs on any host. Prints what a device must
hold and do, and the time that a step can take; ends with code 1 where it does not fit.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from storm_jax.aot.analyse import analyse
from storm_jax.aot.text import lines
from storm_jax.aot.topology import describe
from storm_jax.config import ConfigError, RunConfig, from_mapping

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5p:8x8x8; h100:8x4 (GPUs a host x hosts).")
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of this topology.")
_JSON = flags.DEFINE_string("json", None, "The report goes into this file too.")


def run(config: RunConfig, topology_name: str, slices: int, json_file: Path | None) -> bool:
    """Prints the report; returns whether the step fits."""
    topology = describe(topology_name, slices)
    report = analyse(config, topology)
    for line in lines(report):
        print(line)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return report.fits


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments not understood: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this host is left alone
    try:
        config = from_mapping(RunConfig, json.loads(_CONFIG.value.to_json_best_effort()))
        json_file = Path(_JSON.value).expanduser() if _JSON.value else None
        fits = run(config, _TOPOLOGY.value, _SLICES.value, json_file)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
