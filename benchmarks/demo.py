"""README's demo as a picture: `python benchmarks/demo.py WITH_MAMBA_DIR WITHOUT_DIR`.

Reads the workdirs of the two runs that README names, writes benchmarks/results/demo.json (final
accuracies) and docs/demo.png (training loss and held-out accuracy).
"""

import json
import pathlib
import platform
import sys

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent


def read(workdir: str) -> dict:
    """Loss by step, accuracy by task and configuration of one run."""
    path = pathlib.Path(workdir)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "loss" in row]
    last = [row for row in rows if any(name.startswith("eval/") for name in row)][-1]
    config = json.loads((path / "config.json").read_text())
    return {
        "mamba_layers": config["model"]["temporal"]["layers"],
        "steps": config["train"]["steps"],
        "seed": config["train"]["seed"],
        "accuracy": {k.removeprefix("eval/"): v for k, v in last.items() if k != "step"},
        "records": config["train"]["eval_samples"],
        "loss": [(row["step"], row["loss"]) for row in train],
    }


def main() -> None:
    runs = [read(workdir) for workdir in sys.argv[1:3]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(2, 1))
    for number, run in enumerate(runs):
        name = "with Mamba" if run["mamba_layers"] else "pooling alone"
        left.plot(*zip(*run["loss"], strict=True), label=name)
        tasks = sorted(run["accuracy"])
        places = [i + 0.4 * (number - 0.5) for i in range(len(tasks))]
        right.bar(places, [100 * run["accuracy"][task] for task in tasks], width=0.36, label=name)
        right.set_xticks(range(len(tasks)), tasks)
    left.set(xlabel="step", ylabel="training loss (nats a token)", ylim=(0, 0.6))
    left.legend()
    right.axhline(50, color="grey", linestyle=":", label="chance")
    right.set(ylabel="held-out accuracy (%)", ylim=(0, 105))
    right.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "demo.png", dpi=120)
    about = {"device": platform.machine(), "cores": 2, "jax": jax.__version__}
    for run in runs:
        del run["loss"]
    result = json.dumps({**about, "runs": runs}, indent=1)
    (HERE / "results" / "demo.json").write_text(result + "\n")


if __name__ == "__main__":
    main()
