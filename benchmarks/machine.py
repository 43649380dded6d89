"""What a benchmark ran on, for its results."""

import os
import platform

import av


def describe() -> dict:
    """Processor, cores, load and versions, under "machine" and "versions"."""
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "av": av.__version__,
            "ffmpeg": {k: ".".join(map(str, v)) for k, v in av.library_versions.items()},
        },
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
