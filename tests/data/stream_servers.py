"""Servers of live video for tests: MPEG-TS over plain TCP, and a camera that speaks RTSP.

The camera is what RFC 2326 needs at the least: OPTIONS, DESCRIBE, SETUP and PLAY, with RTP packets
between the replies of the same connection (section 10.12), MPEG-TS in them (RFC 2250).
"""

import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PACKET = 188  # bytes of an MPEG-TS packet
PACKETS = 7  # of them in one of RTP


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    connections = 0


@contextmanager
def serving(handle, port: int = 0) -> Iterator[_Server]:
    """Calls `handle(socket, number of the connection)` for each connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            server.connections += 1
            try:
                handle(self.request, server.connections)
            except OSError:  # the client went away
                pass

    server = _Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def camera(clips: list[bytes], seconds: float):
    """A handler for `serving`: the i-th connection gets the i-th clip of MPEG-TS, then is cut.

    Args:
      seconds: that sending a clip takes.
    """

    def handle(connection: socket.socket, number: int) -> None:
        clip = clips[min(number, len(clips)) - 1]
        reader = connection.makefile("rb")
        while True:
            request = reader.readline().decode().split()
            if not request:
                return
            headers = {}
            while line := reader.readline().decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            reply, body = [f"CSeq: {headers['cseq']}"], ""
            match request[0]:
                case "OPTIONS":
                    reply.append("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
                case "DESCRIBE":
                    body = (
                        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n"
                        "m=video 0 RTP/AVP 33\r\na=control:track1\r\n"
                    )
                    reply += ["Content-Type: application/sdp", f"Content-Base: {request[1]}/"]
                case "SETUP":
                    assert "TCP" in headers["transport"], headers
                    reply += ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1"]
                case "PLAY":
                    reply.append("Session: 1")
            head = "\r\n".join(["RTSP/1.0 200 OK", *reply, f"Content-Length: {len(body)}"])
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            if request[0] == "TEARDOWN":
                return
            if request[0] == "PLAY":
                _play(connection, clip, seconds)
                return

    return handle


def _play(connection: socket.socket, clip: bytes, seconds: float) -> None:
    size = PACKET * PACKETS
    pause = seconds / max(len(clip) // size, 1)
    for number, start in enumerate(range(0, len(clip), size)):
        stamp = int(number * pause * 90_000)
        header = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, stamp & 0xFFFFFFFF, 7)
        packet = header + clip[start : start + size]
        connection.sendall(b"$\x00" + struct.pack(">H", len(packet)) + packet)
        time.sleep(pause)
