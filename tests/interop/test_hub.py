"""Hub ids: what is downloaded from a hub on this machine, and what an unreachable one says."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from storm_jax import checkpoint
from storm_jax.data.text import load_tokenizer
from storm_jax.interop.tokenizer_files import save_tokenizer
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params
from tests.models.references import randomise, vit_params

torch = pytest.importorskip("torch")
import transformers as hf  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/siglip-tiny"


class Hub(http.server.BaseHTTPRequestHandler):
    """The two answers of a hub that a snapshot needs: the list of files, and each of them."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool):
        path = self.path.split("?")[0]
        api, file = f"/api/models/{NAME}/", f"/{NAME}/resolve/{COMMIT}/"
        if path.startswith(api + "revision/"):
            self._send(
                json.dumps({"id": NAME, "sha": COMMIT, "siblings": self._files("rfilename")})
            )
        elif path.startswith(api + "tree/"):
            self._send(json.dumps(self._files("path")))
        elif path.startswith(file) and (self.folder / path.removeprefix(file)).is_file():
            name = path.removeprefix(file)
            self.asked.append(name)
            self._send((self.folder / name).read_bytes(), body)
        else:
            self.send_error(404)

    def _files(self, key: str) -> list[dict]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {
                key: str(f.relative_to(self.folder)),
                "type": "file",
                "size": f.stat().st_size,
                "oid": "",
            }
            for f in files
        ]

    def _send(self, content: str | bytes, body: bool = True):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub on the loopback interface that offers one folder: its class, which notes what is asked
    for, and its address."""
    (tmp_path / "hub").mkdir()
    handler = type("TinyHub", (Hub,), {"folder": tmp_path / "hub", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def environment(tmp_path, **settings) -> dict[str, str]:
    return os.environ | {
        "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "JAX_PLATFORMS": "cpu", **settings,
    }  # fmt: skip


CONFIG = """
from configs import debug

def get_config():
    config = debug.get_config()
    with config.unlocked():
        config.model.vit.update(
            image_size=28, patch_size=7, width=32, mlp=40, layers=3, heads=4, position_grid=4)
    return config
"""


def test_a_hub_id_is_downloaded_and_imported(hub, tmp_path):
    """The command, with the address of a hub alone; only what an import reads is fetched."""
    handler, address = hub
    vision = hf.SiglipVisionConfig(
        image_size=28, patch_size=7, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4,
    )  # fmt: skip
    reference = randomise(hf.SiglipVisionModel(vision))
    reference.save_pretrained(handler.folder, max_shard_size="20KB")
    needed = {path.name for path in handler.folder.iterdir()}
    assert len([name for name in needed if name.endswith(".safetensors")]) > 1
    (handler.folder / "preprocessor_config.json").write_text("{}")
    for name in ("pytorch_model.bin", "model.gguf", "flax_model.msgpack", "README.md"):
        (handler.folder / name).write_bytes(b"not wanted")
    (tmp_path / "config.py").write_text(CONFIG)
    done = subprocess.run(
        [
            sys.executable, "-m", "storm_jax.convert", "import", f"--vit={NAME}",
            f"--config={tmp_path / 'config.py'}", f"--out={tmp_path / 'out'}",
        ],
        env=environment(tmp_path, HF_ENDPOINT=address), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(handler.asked) == needed | {"preprocessor_config.json"}
    config = checkpoint.read_config(tmp_path / "out")
    abstract = abstract_params(StormModel(config.model), make_mesh(config.mesh))
    got = checkpoint.load_params(tmp_path / "out", {"vit": abstract["vit"]})["vit"]
    expected = nnx.traversals.flatten_mapping(vit_params(reference, 3, True))
    for path, value in nnx.traversals.flatten_mapping(got).items():
        np.testing.assert_array_equal(value, expected[path])


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"HF_HUB_OFFLINE": "1"}, "outgoing traffic has been disabled"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "Connection refused"),
    ],
)
def test_without_a_hub_the_error_says_what_to_give(settings, reason, tmp_path):
    code = f"from storm_jax.interop.files import resolve; resolve({NAME!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path, **settings), cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    message = done.stderr.split("WeightsError: ")[-1]
    assert message.startswith(f"{NAME} is no folder here") and reason in message
    assert "give the path of a local folder with config.json and *.safetensors" in message
    assert f"`hf download {NAME} --local-dir DIR`" in message


def test_a_hub_that_lacks_the_repository(hub, tmp_path):
    code = "from storm_jax.interop.files import resolve; resolve('somebody/else')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path, HF_ENDPOINT=hub[1]), cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert "somebody/else is no folder here" in done.stderr
    assert "give the path of a local folder" in done.stderr


TRAVEL = """
import socket, sys, time
from pathlib import Path
from storm_jax.data.text import load_tokenizer
from storm_jax.interop.tokenizer_files import save_tokenizer

start = time.monotonic()
tokenizer = load_tokenizer(sys.argv[1])
def none(*args, **kwargs):
    raise AssertionError("a tokenizer that is here needs no network")
socket.create_connection = socket.getaddrinfo = none
save_tokenizer(tokenizer, Path(sys.argv[2]))
print(time.monotonic() - start)
"""


def test_a_tokenizer_in_the_cache_needs_no_network(hub, tmp_path):
    handler, address = hub
    save_tokenizer(load_tokenizer("bytes"), handler.folder)
    (handler.folder / "chat_template.jinja").write_text("{{ messages }}")
    (handler.folder / "generation_config.json").write_text('{"temperature": 0.7}')
    needed = {path.name for path in handler.folder.iterdir()}
    (handler.folder / "model.safetensors").write_bytes(b"not wanted")

    def travel(name, out, **settings):
        done = subprocess.run(
            [sys.executable, "-c", TRAVEL, name, str(tmp_path / out)],
            env=environment(tmp_path, **settings), cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (tmp_path / out / name).read_bytes() == (handler.folder / name).read_bytes()
        config = (tmp_path / out / "tokenizer_config.json").read_text()
        assert str(tmp_path) not in config
        return float(done.stdout)

    travel(NAME, "first", HF_ENDPOINT=address)
    assert set(handler.asked) == needed
    # (With a retry for each file that a repository may have, it took minutes.)
    assert travel(NAME, "again", HF_ENDPOINT="http://127.0.0.1:1") < 20
    assert travel(str(tmp_path / "first"), "folder", HF_ENDPOINT="http://127.0.0.1:1") < 20
