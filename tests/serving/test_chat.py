"""Chat completions over HTTP, of a real engine behind a real server."""

from tests.serving.conftest import data_url, image, video, words


def test_first(served, media):
    r = served.ask(video(data_url(media / "clip.mp4")), words("What?"))
    print(r.status_code, r.text)
    r = served.ask(video(data_url(media / "clip.mp4")), words("What?"), stream=True, stream_options={"include_usage": True}, max_tokens=400)
    print(r.status_code, r.text[-1500:])
    print(served.client.get("/metrics").text)
    assert 0
