"""The report: tables as markdown and CSV, plots, and the page docs/evidence.md completed."""

import collections
import dataclasses
import json
import re
import shutil
from pathlib import Path

from storm_jax.evidence_grid import plots, tables
from storm_jax.evidence_grid.latency import Latency
from storm_jax.evidence_grid.recipe import EvidenceError
from storm_jax.evidence_grid.results import Folder, Result

_BLOCK = re.compile(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def write(out: str, latency_file: str, docs: str, with_plots: bool = True) -> list[str]:
    """Writes OUT/report and completes a page; returns the lines to show.

    Args:
      out: folder of the grid.
      latency_file: JSON of benchmarks/latency.py, "" for none.
      docs: page whose blocks, from `<!-- begin NAME -->` to `<!-- end NAME -->`, are filled; or "".

    Raises:
      EvidenceError: there are no results, or a file cannot be used.
    """
    results = Folder(out).read()
    latency = Latency(latency_file) if latency_file else None
    folder = Path(out) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    found = {make.__name__: make(results) for make in tables.OF_GRID}
    if latency is not None:
        rows = found["claims"].rows + latency.claims()
        found["claims"] = dataclasses.replace(found["claims"], rows=rows)
        found["table13"] = latency.table()
    for name, table in found.items():
        (folder / f"{name}.md").write_text(table.markdown(), encoding="utf-8")
        (folder / f"{name}.csv").write_text(table.csv(), encoding="utf-8")
    pictures = plots.draw(results, latency, folder) if with_plots else []
    blocks = {name: table.markdown() for name, table in found.items()}
    blocks["run"] = _described(results)
    if docs:
        _complete(Path(docs), blocks, pictures)
    claims = found["claims"]
    return [f"table {row[0]}: {row[1]}: {row[5].strip('*')}" for row in claims.rows]


def _complete(page: Path, blocks: dict[str, str], pictures: list[Path]) -> None:
    """Fills the blocks of a page; pictures go into a folder beside it, named as the page."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise EvidenceError(f"--docs={page} cannot be read: {error}") from error
    unknown = sorted({m[1] for m in _BLOCK.finditer(text)} - set(blocks))
    if unknown:
        raise EvidenceError(f"{page} has blocks that no table fills: {', '.join(unknown)}")
    images = page.parent / page.stem
    for picture in pictures:
        images.mkdir(exist_ok=True)
        shutil.copy(picture, images / picture.name)

    def filled(match: re.Match) -> str:
        name, text = match[1], blocks[match[1]]
        if any(picture.stem == name for picture in pictures):
            text += f"\n![{name}]({page.stem}/{name}.png)\n"
        return f"<!-- begin {name} -->\n{text}<!-- end {name} -->"

    page.write_text(_BLOCK.sub(filled, text), encoding="utf-8")


def _described(results: dict[str, Result]) -> str:
    """What was run, on what, and for how long."""
    runs = [result.run for result in results.values()]
    recipe = runs[0]["recipe"]
    devices = collections.Counter(run["device"] for run in runs)
    on = ", ".join(f"{count} on {device}" for device, count in sorted(devices.items()))
    on = on if len(devices) > 1 else f"on {next(iter(devices))}"
    versions = sorted({json.dumps(run["versions"]) for run in runs})
    seconds = sum(run["seconds"] for run in runs)
    long = {run["recipe"]["point"]["frames"]: run["recipe"]["long"] for run in runs}
    lines = [
        f"- {len(runs)} models of {recipe['seeds']} seeds each, {on};"
        f" {seconds / 60:.0f} minutes of processes that shared a device; {'; '.join(versions)}",
        f"- videos: `{json.dumps(recipe['videos'])}`",
        f"- model: `{json.dumps(recipe['sizes'])}`",
        f"- first stage, short clips, no reduction: `{json.dumps(recipe['short'])}`",
        f"- second stage, short clips, reduced: `{json.dumps(recipe['reduced'])}`",
        *(
            f"- third stage, {frames} frames of long clips: `{json.dumps(stage)}`"
            for frames, stage in sorted(long.items())
        ),
        f"- parameters: {min(r['parameters'] for r in runs):,} to"
        f" {max(r['parameters'] for r in runs):,} in all",
    ]
    return "\n".join(lines) + "\n"
