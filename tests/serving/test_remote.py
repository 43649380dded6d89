"""Media of other servers: what is fetched, and what never is."""

import asyncio
import http.server
import ipaddress
import socket
import threading
import time

import pytest

pytest.importorskip("httpx2")
from storm_jax.serving.errors import ApiError
from storm_jax.serving.remote import Remote, is_public

# Here 127.0.0.1 plays the public internet, and every other address a private one.
PUBLIC = ipaddress.ip_address("127.0.0.1")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "fd12::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_private_addresses(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(ipaddress.ip_address(address))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        port = self.server.server_port
        match self.path.split("?")[0]:
            case "/video":
                self._answer(200, b"x" * 1000)
            case "/none":
                self._answer(404, b"")
            case "/redirect":
                self._redirect("/video")
            case "/redirect_private":
                self._redirect(f"http://127.0.0.2:{port}/video")
            case "/redirect_decimal":
                self._redirect(f"http://{int(ipaddress.ip_address('127.0.0.2'))}:{port}/video")
            case "/redirect_file":
                self._redirect("file:///etc/passwd")
            case "/redirect_loop":
                self._redirect("/redirect_loop")
            case "/long_announced":
                self._answer(200, b"x", length=10**9)
            case "/endless":
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                try:
                    while True:
                        self.wfile.write(b"x" * 65536)
                except OSError:
                    self.server.cut.set()
            case "/slow":
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                try:
                    for _ in range(100):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                        time.sleep(0.05)
                except OSError:
                    self.server.cut.set()
            case "/bad_length":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n")
                self.close_connection = True

    def _answer(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, where):
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # clients that leave are what is tested


@pytest.fixture
def server():
    """Listens on all of 127.0.0.0/8 and notes what it is asked for."""
    with _Server(("0.0.0.0", 0), _Handler) as running:
        running.seen, running.cut = [], threading.Event()
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


def fetched(url, allowed=lambda address: address == PUBLIC, max_bytes=1 << 20, seconds=5.0):
    async def run():
        remote = Remote(max_bytes, seconds, allowed)
        try:
            with await remote.fetch(url, "here") as file:
                return file.read()
        finally:
            await remote.close()

    return asyncio.run(run())


def refused(*arguments, **options) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetched(*arguments, **options)
    return caught.value


def test_fetched(server):
    base = f"http://127.0.0.1:{server.server_port}"
    assert fetched(f"{base}/video?a=b") == b"x" * 1000
    assert fetched(f"{base}/redirect") == b"x" * 1000
    assert [path for path, _ in server.seen] == ["/video?a=b", "/redirect", "/video"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "localhost", "2130706434", "0x7f000002", "0177.0.0.2", "127.2", "[::1]",
     "[::ffff:127.0.0.2]", "0", "[::]"],
)  # fmt: skip
def test_spellings_of_private_addresses(server, host):
    if host == "localhost":  # a name; here it must not be 127.0.0.1, which plays the internet
        error = refused(f"http://localhost:{server.server_port}/video", is_public)
    else:
        error = refused(f"http://{host}:{server.server_port}/video")
    if host == "0177.0.0.2":  # the client library reads no octal numbers
        assert "InvalidURL" in error.message
    else:
        assert (error.status, error.code) == (403, "address_not_allowed")
    assert server.seen == []


def test_the_default_refuses_this_machine(server):
    error = refused(f"http://127.0.0.1:{server.server_port}/video", is_public)
    assert error.status == 403 and server.seen == []


@pytest.mark.parametrize("path", ["redirect_private", "redirect_decimal", "redirect_file"])
def test_redirects_are_checked_again(server, path):
    error = refused(f"http://127.0.0.1:{server.server_port}/{path}")
    assert error.status in (400, 403) and [seen for seen, _ in server.seen] == [f"/{path}"]
    if path != "redirect_file":
        assert error.code == "address_not_allowed"


def answers(monkeypatch, *rounds):
    """Lets the name server know "name.test", with other addresses each time it is asked."""
    asked = []
    real = socket.getaddrinfo

    def lookup(host, port, *arguments, **options):
        if host != "name.test":
            return real(host, port, *arguments, **options)
        addresses = rounds[min(len(asked), len(rounds) - 1)]
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return asked


def test_names(server, monkeypatch):
    asked = answers(monkeypatch, ["127.0.0.1"])
    assert fetched(f"http://name.test:{server.server_port}/video") == b"x" * 1000
    assert server.seen == [("/video", f"name.test:{server.server_port}")]
    assert len(asked) == 1


@pytest.mark.parametrize("addresses", [["127.0.0.2"], ["127.0.0.1", "127.0.0.2"]])
def test_names_with_a_private_address(server, monkeypatch, addresses):
    answers(monkeypatch, addresses)
    error = refused(f"http://name.test:{server.server_port}/video")
    assert error.code == "address_not_allowed" and server.seen == []


def test_a_name_server_that_changes_its_mind(server, monkeypatch):
    """The checked address is connected to: a second look-up would find the private one."""
    asked = answers(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    assert fetched(f"http://name.test:{server.server_port}/video") == b"x" * 1000
    assert len(asked) == 1
    error = refused(f"http://name.test:{server.server_port}/video")
    assert error.code == "address_not_allowed"


def test_no_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.2:{server.server_port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.2:{server.server_port}")
    assert fetched(f"http://127.0.0.1:{server.server_port}/video") == b"x" * 1000
    assert [path for path, _ in server.seen] == ["/video"]


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("none", 400, "status 404"),
        ("redirect_loop", 400, "TooManyRedirects"),
        ("long_announced", 413, "larger than 1048576"),
        ("endless", 413, "larger than 1048576"),
        ("bad_length", 400, "failed"),
    ],
)
def test_failures(server, path, status, said):
    error = refused(f"http://127.0.0.1:{server.server_port}/{path}")
    assert error.status == status and said in error.message
    if path == "endless":
        assert server.cut.wait(5)


def test_slow_servers(server):
    began = time.monotonic()
    error = refused(f"http://127.0.0.1:{server.server_port}/slow", seconds=0.5)
    assert error.status == 400 and "longer than 0.5 s" in error.message
    assert time.monotonic() - began < 3 and server.cut.wait(5)


@pytest.mark.parametrize(
    "url",
    ["http://", "http://user:secret@127.0.0.1/", "http://127.0.0.1:99999/", "http://[::1",
     "http://no-such-name.invalid/", "http://127.0.0.1:1/", "http://\x00/"],
)  # fmt: skip
def test_urls_that_lead_nowhere(url):
    error = refused(url)
    assert error.status in (400, 403) and "secret" not in error.message
