"""Draws benchmarks/results/scan_gpu_kernels.json into docs/kernels.png."""

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent


def main() -> None:
    results = json.loads((HERE / "results" / "scan_gpu_kernels.json").read_text())
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for panel, dtype in zip(panels, ("bfloat16", "float32"), strict=True):
        rows = [row for row in results["scans"] if row["dtype"] == dtype]
        names = [f"{r['batch']} x {r['channels']}\n{r['length']}" for r in rows]
        place = np.arange(len(rows))
        bars = (
            ("forward_ms", "mamba_ssm_forward_ms", "tab:blue", -0.2, "forward"),
            ("backward_ms", "mamba_ssm_backward_ms", "tab:orange", 0.2, "backward"),
        )
        for ours, peer, color, shift, name in bars:
            peers = [row[peer] for row in rows]
            times = [row[ours]["median"] for row in rows]
            place_of = place + shift
            panel.bar(place_of, peers, 0.36, color=color, alpha=0.3, label=f"{name}, mamba_ssm")
            panel.bar(place_of, times, 0.36, color=color, label=f"{name}, storm_kernels")
        panel.set_xticks(place, names, fontsize=7)
        panel.set_title(f"{dtype}, {results['device']}", fontsize=9)
        panel.set_xlabel("batch x channels, length")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("ms")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "kernels.png", dpi=120)


if __name__ == "__main__":
    main()
