"""The folder of a run: on a disk that all hosts share, or in a bucket (gs://).

Checkpoints are written there directly. Small files that grow (metrics, lists of records) are
written to a disk: to the workdir itself, or beside a bucket to a folder of this host, whose files
`sync` copies up.
"""

import importlib.util
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path

import jax
from etils import epath

from storm_jax.config import ConfigError
from storm_jax.parallel import processes


def location(path: str | os.PathLike) -> epath.Path:
    """An absolute path, or a bucket's as it is (a `pathlib.Path` would make gs:/ of gs://)."""
    text = os.fspath(path)
    return epath.Path(text) if "://" in text else epath.Path(text).expanduser().absolute()


class Workdir:
    """The folder of a run.

    Attributes:
      path: where it is.
      local: a folder on a disk for files that grow; `path` itself unless that is a bucket.
    """

    def __init__(self, path: str):
        """Makes the folder and shows that every process can write there what the others read.

        Raises:
          ConfigError: it cannot be written, a package is missing, or it is not the same folder on
            every host; on all processes.
        """
        self.path = location(path)
        self._bucket = "://" in path
        if self._bucket and not path.startswith("gs://"):
            raise ConfigError(
                f"--workdir={path}: Orbax writes to folders and to gs:// buckets; mount other"
                " storage and give the folder"
            )
        if self._bucket and importlib.util.find_spec("gcsfs") is None:
            raise ConfigError(
                f"--workdir={path} needs the package gcsfs: pip install 'storm_jax[gcs]'"
            )
        self._probe(path)
        if self._bucket:
            self.local = Path(tempfile.mkdtemp(prefix="storm_jax_"))
            for file in self.path.glob("*.jsonl"):
                if jax.process_index() in (0, _owner(file.name)):
                    file.copy(self.local / file.name)
        else:
            self.local = Path(self.path)

    def _probe(self, path: str) -> None:
        """Process 0 writes a file that all others look for; every process writes one of its own."""
        names = processes.gathered(f".probe-{uuid.uuid4().hex}")
        own = self.path / names[jax.process_index()]
        with processes.together(ConfigError):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                own.write_text("probe")
            except Exception as error:  # of the file system or of the bucket's client
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"--workdir={path} cannot be written ({reason}); give a folder or bucket that"
                    " this user may write to"
                ) from error
        with processes.together(ConfigError):
            unseen = [p for p, name in enumerate(names) if not (self.path / name).exists()]
            if unseen:
                raise ConfigError(
                    f"--workdir={path} lacks what process {unseen[0]} has just written there: it"
                    " must be one folder that all hosts share, or a bucket"
                )
        with processes.together():  # nobody removes what another still looks for
            pass
        own.unlink()

    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        if self._bucket:
            (self.path / name).write_text(text)
        else:
            replace_text(self.local / name, text)

    def sync(self) -> None:
        """Copies this process's files to the bucket."""
        if not self._bucket:
            return
        for file in self.local.rglob("*"):
            if file.is_file() and _owner(file.name) == jax.process_index():
                target = self.path / file.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(file).copy(target, overwrite=True)

    def close(self) -> None:
        """`sync`, and removes the folder of this host that stood in for a bucket."""
        self.sync()
        if self._bucket:
            shutil.rmtree(self.local, ignore_errors=True)


def _owner(name: str) -> int:
    """The process that writes a file: NAME-PROCESS.jsonl says so, and process 0 all others."""
    found = re.fullmatch(r".*-(\d+)\.jsonl", name)
    return int(found[1]) if found else 0


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)
