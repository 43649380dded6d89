"""Compiles the training step for a pod that is not there.

    python -m storm_jax.compile --config=configs/long.py --topology=v5p:8x8x8

No accelerator is needed: libtpu or XLA's CUDA compiler runs on any host. Prints what a device must
hold and do, and the time that a step can take. Where it does not fit, compiles changes that may
help, prints what each needs, and ends with code 1. `--sweep` ranks meshes and recomputation.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from storm_jax.aot.analyse import analyse
from storm_jax.aot.isolated import Outcome
from storm_jax.aot.sweep import outcome_json, outcome_line, sweep, what_would_help
from storm_jax.aot.text import lines
from storm_jax.aot.topology import Topology, describe
from storm_jax.config import ConfigError, RunConfig, from_mapping
from storm_jax.config_arguments import spelled_out

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5p:8x8x8; h100:8x4 (GPUs a host x hosts).", required=True
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of this topology.")
_JSON = flags.DEFINE_string("json", None, "The report, or the sweep's, goes into this file too.")
_ADVICE = flags.DEFINE_boolean("advice", True, "Where it does not fit, compile what may help.")
_SWEEP = flags.DEFINE_boolean("sweep", False, "Try meshes and recomputation policies.")
_SWEEP_LIMIT = flags.DEFINE_integer("sweep_limit", 24, "Meshes that a sweep tries at most.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Variants compiled at a time; each takes some GiB.")


def report_one(config: RunConfig, topology: Topology) -> tuple[bool, dict]:
    """Prints the report of a config, and what would help; returns whether it fits, and the JSON."""
    report = analyse(config, topology)
    for line in lines(report):
        print(line, flush=True)
    data = report.to_json()
    if not report.fits and _ADVICE.value:
        print("\nWhat would help, compiled:", flush=True)
        helpful = what_would_help(
            config, topology.name, _SLICES.value, report.mesh, workers=_WORKERS.value, say=_say
        )
        _print_best(helpful)
        data["advice"] = [outcome_json(outcome) for outcome in helpful]
    return report.fits, data


def report_sweep(config: RunConfig, topology: Topology) -> tuple[bool, dict]:
    """Prints a ranking of variants; returns whether one fits, and the JSON."""
    ranked = sweep(
        config, topology.name, _SLICES.value, len(topology.devices),
        limit=_SWEEP_LIMIT.value, workers=_WORKERS.value, say=_say,
    )  # fmt: skip
    _print_best(ranked)
    return any(o.fits for o in ranked), {"sweep": [outcome_json(o) for o in ranked]}


def _print_best(outcomes: list[Outcome]) -> None:
    fitting = [outcome for outcome in outcomes if outcome.fits]
    print(f"\n{len(fitting)} of {len(outcomes)} fit" + (", best first:" if fitting else ""))
    for outcome in fitting or outcomes[:3]:
        print(f"  {outcome_line(outcome)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments not understood: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")  # an accelerator of this host is left alone
    try:
        config = from_mapping(RunConfig, json.loads(_CONFIG.value.to_json_best_effort()))
        topology = describe(_TOPOLOGY.value, _SLICES.value)
        fits, data = (report_sweep if _SWEEP.value else report_one)(config, topology)
        if _JSON.value:
            Path(_JSON.value).expanduser().write_text(json.dumps(data, indent=1) + "\n")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    sys.argv[:] = spelled_out(sys.argv)
    app.run(main)
