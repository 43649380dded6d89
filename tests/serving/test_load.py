"""benchmarks/serve_load.py, shorter: no error, memory flat, every slot given back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from tests.serving.harness import SETTINGS, running

ROOT = Path(__file__).parents[2]
CLIENTS = 16
SECONDS = 30
CACHE = 1 << 20  # bytes: some sixty media


@pytest.mark.slow
def test_sixteen_clients(loaded, tokenizer, tmp_path):
    settings = dataclasses.replace(SETTINGS, max_requests=CLIENTS + 8, cache_bytes=CACHE)
    with running(loaded, tokenizer, settings, slots=8) as found:
        done = subprocess.run(
            [
                sys.executable, "benchmarks/serve_load.py", f"--url={found.url}",
                f"--clients={CLIENTS}", f"--seconds={SECONDS}", "--baseline_seconds=3",
                "--warm_up=5", "--longest_warm_up=60", "--tokens=40", "--shortest=10",
                "--fresh=3", f"--out={tmp_path / 'load.json'}",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "load.json").read_text())
        assert found.server.scheduler.free_slots == 8
    load = result["all_clients"]
    assert load["errors"] == 0 and load["answered"] > 5 * CLIENTS
    assert load["left_by_the_client"] > 0
    # The client that measures and the server have one machine, so this says little of batching.
    assert result["throughput_ratio"] > 1
    assert result["memory"]["rss"]["ratio"] < 1.1
    assert result["memory"]["open_files"]["ratio"] < 1.5
    after = result["after"]
    assert after["storm_requests_open"] == after["storm_requests_running"] == 0
    assert 0 < after["storm_visual_cache_bytes"] <= CACHE
