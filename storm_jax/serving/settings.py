"""What a server may be asked to do, and how much of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and permissions; docs/serving.md explains each beside its flag."""

    model: str  # the name that clients ask for
    api_key: str = ""  # "": everyone may ask
    allowed_media_path: tuple[str, ...] = ()
    allow_remote_media: bool = False
    max_frames: int = 128  # of one video
    max_media: int = 16  # of one request
    max_pixels: int = 1 << 26  # of one picture as stored
    max_body_bytes: int = 256 << 20
    max_media_bytes: int = 256 << 20  # of one medium that is not a local video
    max_requests: int = 64  # at one time, waiting ones included
    max_tokens: int = 256  # of an answer, where the request does not say
    receive_seconds: float = 60.0  # for the body of a request
    fetch_seconds: float = 30.0  # for one remote medium
    decode_seconds: float = 30.0  # for one medium
    request_seconds: float = 600.0  # from its body to the end of its answer
    decoders: int = 4  # processes
    cache_bytes: int = 1 << 30  # of encoded media, on the device
