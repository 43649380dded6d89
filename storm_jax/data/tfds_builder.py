"""Prepares a TFDS data set of conversations about videos, without TensorFlow.

    python -m storm_jax.data.tfds_builder --data_dir=DIR --train=PATH [--test=PATH] [--paths]

writes DIR/llava_video/1.0.0, which `path` of a source then names (`split` says which split). PATH
is what `path` is in a configuration: JSON of the LLaVA-Video kind, tars, parquet, a mixture. Media
go into the examples as the bytes of their files; --paths keeps the paths alone. Features:

    id, data_source, task   text
    conversations           sequence of {from, value}
    media                   sequence of {type, path, start, end, bytes}; NaN: no start or no end

`tfds.data_source("llava_video", data_dir=DIR, split="train")` gives the same examples. TFDS's own
`Video` feature is not used: it stores decoded frames, and needs TensorFlow.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from storm_jax.config import SourceConfig
from storm_jax.data.convert import contents, fields, medium_fields
from storm_jax.data.open_records import Part, open_records
from storm_jax.data.records import RecordError


class LlavaVideo(tfds.core.GeneratorBasedBuilder):
    """Records of any source, in their order.

    Attributes:
      left_out: messages of the records that cannot be used, after `download_and_prepare`.
    """

    VERSION = tfds.core.Version("1.0.0")
    name = "llava_video"
    # TFDS 4.9.10 looks for it with importlib_resources, which it does not ask for when installed.
    code_path = epath.Path(__file__)
    left_out: list[str]

    def __init__(self, data_dir: str, splits: Mapping[str, Sequence[Part]], with_media: bool):
        """`splits` are the data sets of each split; `with_media` puts media into the examples."""
        self._parts, self._with_media = splits, with_media
        self.left_out = []
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about videos and images.",
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "data_source": text(),
                    "task": text(),
                    "conversations": tfds.features.Sequence({"from": text(), "value": text()}),
                    "media": tfds.features.Sequence(
                        {
                            "type": text(),
                            "path": text(),
                            "start": np.float64,
                            "end": np.float64,
                            "bytes": tfds.features.Tensor(shape=(), dtype=np.object_),
                        }
                    ),
                }
            ),
            disable_shuffling=True,  # training shuffles by itself
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(parts) for split, parts in self._parts.items()}

    def _generate_examples(self, parts: Sequence[Part]) -> Iterator[tuple[int, dict[str, Any]]]:
        key = 0
        for part in parts:
            for number in part.chosen.tolist():
                try:
                    yield key, self._example(part, number)
                except RecordError as error:
                    self.left_out.append(str(error))
                    continue
                key += 1

    def _example(self, part: Part, number: int) -> dict[str, Any]:
        record = part.records[number]
        media = []
        for medium in record.media:
            path = os.path.basename(medium.path) if self._with_media else medium.path
            data = contents(part.records, medium) if self._with_media else b""
            times = {"start": math.nan, "end": math.nan}
            media.append(times | medium_fields(medium, path) | {"bytes": data})
        return {"task": ""} | fields(record, media)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare a TFDS data set without TensorFlow.")
    parser.add_argument("--data_dir", required=True, help="folder of the TFDS data sets")
    parser.add_argument("--train", required=True, help="what `path` is in a configuration")
    parser.add_argument("--test", default="", help="the same for the split test")
    parser.add_argument("--media_root", default="", help="folder of the media; that of each path")
    parser.add_argument("--paths", action="store_true", help="leave the media where they are")
    args = parser.parse_args(argv)
    paths = {"train": args.train, "test": args.test}
    try:
        splits = {
            split: open_records(SourceConfig(path, args.media_root))
            for split, path in paths.items()
            if path
        }
    except RecordError as error:
        print(error, file=sys.stderr)
        return 1
    builder = LlavaVideo(args.data_dir, splits, with_media=not args.paths)
    builder.download_and_prepare()
    print(builder.data_dir)
    for reason in builder.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    return 1 if builder.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
