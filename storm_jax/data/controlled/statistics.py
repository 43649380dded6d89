"""Tables of what a controlled data set holds.

python -m storm_jax.data.controlled.statistics DIR
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_SPLITS = ("train", "test", "test_seen")


@dataclass(frozen=True)
class FamilyStatistics:
    """Counts of one family in one split.

    Attributes:
      records: questions, one video each.
      questions: different ones.
      chance: accuracy of guessing: mean of 1 / options.
      majority: accuracy of always giving the text that is most often right.
      places: how often each place in the list of options is right.
      answers: how often each text is right.
      video_bytes: of a file, mean.
    """

    records: int
    questions: int
    chance: float
    majority: float
    places: dict[int, int]
    answers: dict[str, int]
    video_bytes: float


def statistics(folder: str) -> dict[str, dict[str, FamilyStatistics]]:
    """Statistics of each split and family of a finished data set.

    Raises:
      ValueError: the folder holds no finished data set.
    """
    try:
        with open(os.path.join(folder, "dataset.json"), encoding="utf-8") as file:
            complete = json.load(file)["complete"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder} is no folder of `python -m storm_jax.data.controlled --out=DIR` ({error})"
        ) from None
    if not complete:
        raise ValueError(f"{folder} is not finished; run its command again")
    found: dict[str, dict[str, FamilyStatistics]] = {}
    for split in _SPLITS:
        families = collections.defaultdict(list)
        with open(os.path.join(folder, f"{split}.jsonl"), encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                families[record["task"]].append(record)
        found[split] = {name: _family(folder, records) for name, records in families.items()}
    return found


def _family(folder: str, records: list[dict]) -> FamilyStatistics:
    answers = collections.Counter(r["options"][r["answer"]] for r in records)
    sizes = [os.path.getsize(os.path.join(folder, r["media"][0]["path"])) for r in records]
    return FamilyStatistics(
        records=len(records),
        questions=len({r["conversations"][0]["value"] for r in records}),
        chance=sum(1 / len(r["options"]) for r in records) / len(records),
        majority=max(answers.values()) / len(records),
        places=dict(sorted(collections.Counter(r["answer"] for r in records).items())),
        answers=dict(answers.most_common()),
        video_bytes=sum(sizes) / len(sizes),
    )


def table(folder: str) -> str:
    """The same as a table in Markdown, one for each split."""
    found = statistics(folder)
    with open(os.path.join(folder, "dataset.json"), encoding="utf-8") as file:
        frames = json.load(file)["parameters"]["frames"]
    lines = []
    for split, families in found.items():
        lines += [
            f"{split}: {sum(f.records for f in families.values())} records of {frames} frames",
            "",
            "| family | records | questions | chance | most frequent answer | right: 1st, 2nd, …"
            " option | different answers | bytes a frame |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, f in families.items():
            places = ", ".join(map(str, f.places.values()))
            lines.append(
                f"| {name} | {f.records} | {f.questions} | {f.chance:.3f} | {f.majority:.3f} |"
                f" {places} | {len(f.answers)} | {f.video_bytes / frames:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print what a controlled data set holds.")
    parser.add_argument("folder", help="OUT of python -m storm_jax.data.controlled")
    folder = parser.parse_args(argv).folder
    try:
        print(table(folder))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
