"""Accuracy of a checkpoint against what the options that the paper does not have leave of a video.

    python benchmarks/fewer_tokens.py --checkpoint=runs/tiny --data=data/synthetic/test.jsonl
        --out=benchmarks/results/fewer_tokens_tiny.json

`storm_jax.evaluate` asks all questions with each share of `--keep_tokens` and each threshold of
`--duplicate_threshold`, and with the checkpoint as it was trained; the same temporal sampling
besides, for comparison. --work keeps the answers, and a second start goes on there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def asked(checkpoint: str, data: str, option: str, out: Path) -> dict:
    """One evaluation: accuracies with their intervals, and means of what was kept."""
    command = [
        sys.executable, "-m", "storm_jax.evaluate", f"--checkpoint={checkpoint}", "--tasks=own",
        f"--data={data}", f"--out={out}", *([option] if option else []),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    result = json.loads((out / "own" / "result.json").read_text())
    return {
        "option": option or "as trained",
        "main": result["score"]["main"],
        "groups": result["score"]["groups"],
        "cost": result["cost"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="questions, as --data of evaluate")
    parser.add_argument("--keep", default="0.875,0.75,0.625,0.5", help="shares of tokens")
    parser.add_argument("--thresholds", default="0.5,1,2,4,8", help="levels of 255")
    parser.add_argument("--sampling", default="2", help="every so many pooled frames")
    parser.add_argument("--work", type=Path, help="folder of the answers; default: temporary")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from benchmarks import machine
    from storm_jax import checkpoint

    options = [""]
    for flag, values in [
        ("keep_tokens", arguments.keep),
        ("duplicate_threshold", arguments.thresholds),
        ("temporal_sampling", arguments.sampling),
    ]:
        options += [f"--{flag}={value}" for value in values.split(",") if value]
    config = checkpoint.read_config(arguments.checkpoint)
    report = {
        **machine.describe(), "run": config.name, "dtype": config.model.dtype,
        "frames": config.data.frames.max_frames, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        for option in options:
            name = option.strip("-").replace("=", "_") or "as_trained"
            row = asked(arguments.checkpoint, arguments.data, option, work / name)
            report["rows"].append(row)
            print(row["option"], row["main"], row["cost"], file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
