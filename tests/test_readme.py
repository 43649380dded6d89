"""README's table of visual tokens is what the model does."""

import dataclasses
import json
import re
from pathlib import Path

from configs import long
from storm_jax.config import ReductionConfig, RunConfig, from_mapping

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_visual_tokens():
    model = from_mapping(RunConfig, json.loads(long.get_config().to_json_best_effort())).model
    header, _, *rows = re.search(r"\| reduction \|.*?\n\n", README, re.S)[0].strip().split("\n")
    frames = [int(word) for word in re.findall(r"(\d+) frames", header)]
    assert frames == [32, 128, 256, 1000] and len(rows) == 7
    for row in rows:
        name, image, *tokens = (cell.strip() for cell in row.strip("|").split("|"))
        rates = {
            "temporal_pool": re.search(r"temporal pooling (\d)", name),
            "spatial_pool": re.search(r"spatial pooling (\d)", name),
            "temporal_sampling": re.search(r"sampling (\d)", name),
        }
        reduction = ReductionConfig(**{k: int(m[1]) for k, m in rates.items() if m})
        config = dataclasses.replace(model, reduction=reduction)
        counts = [config.visual_tokens(n) for n in (1, *frames)]
        assert [int(x.replace(",", "")) for x in (image, *tokens)] == counts, name
