"""The web page, in a browser without a window."""

import dataclasses
import re
import shutil
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

pytest.importorskip("playwright")
from playwright.sync_api import expect, sync_playwright

from tests.serving.harness import SETTINGS, running

pytestmark = pytest.mark.slow
expect.set_options(timeout=30_000)  # ms


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page; what goes wrong in it, and whatever it asks of elsewhere, fails the test."""
    opened = browser.new_page()
    opened.set_default_timeout(30_000)
    wrong = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None
    )
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    opened.close()
    assert not wrong
    assert all(re.match(r"http://127\.0\.0\.1:|blob:|data:", url) for url in asked), asked


def ask(page, question):
    page.fill("#question", question)
    page.click("#send")


def test_a_video_is_asked_about(page, served, media):
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.set_input_files("#files", [media / "clip.mp4", media / "picture.png"])
    expect(page.locator("#media video")).to_have_count(1)
    expect(page.locator("#media img")).to_have_js_property("naturalWidth", 64)
    page.fill("#tokens", "120")
    page.fill("#temperature", "1")
    ask(page, "What happens?")
    expect(page.locator("#log .user")).to_have_text("What happens?")
    expect(page.locator("#send")).to_be_enabled()
    answer = page.locator("#log .assistant").text_content()
    assert answer and not page.locator("#log .error").count()
    assert page.text_content("#n-frames") == "9"  # 8 of the video and the image
    assert page.text_content("#n-visual") == "36 → 20"
    assert float(page.text_content("#n-first")) > 0
    assert 0 < int(page.text_content("#n-answer")) <= 120
    assert float(page.text_content("#n-speed")) > 0

    # The conversation goes on, with the media kept.
    prompt = int(page.text_content("#n-prompt"))
    ask(page, "And then?")
    expect(page.locator("#log .assistant")).to_have_count(2)
    expect(page.locator("#send")).to_be_enabled()
    assert int(page.text_content("#n-prompt")) > prompt + len("And then?")
    assert "(kept)" in page.text_content("#n-media")

    page.click("#new")
    expect(page.locator("#log p")).to_have_count(0)


def test_the_answer_grows_and_can_be_stopped(page, served, monkeypatch):
    engine = served.server.scheduler._engine
    step = engine.step

    def slowly(*arguments, **options):
        time.sleep(0.15)
        return step(*arguments, **options)

    monkeypatch.setattr(engine, "step", slowly)
    page.goto(served.url)
    page.fill("#tokens", "1900")
    ask(page, "x")
    shown = page.locator("#log .assistant")
    lengths: list[int] = []
    for _ in range(200):
        lengths.append(len(shown.text_content()))
        page.wait_for_timeout(50)
        if len(set(lengths)) > 2:
            break
    assert lengths == sorted(lengths) and len(set(lengths)) > 2
    assert served.metric("storm_requests_running") == 1
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    served.idle()


def test_reasons_are_shown_as_text(page, served, tmp_path):
    (tmp_path / "<b>bad.mp4").write_text("no video")
    page.goto(served.url)
    page.set_input_files("#files", tmp_path / "<b>bad.mp4")
    ask(page, "<img src=x onerror=alert(1)>")
    expect(page.locator("#log .error")).to_contain_text("cannot be opened")
    expect(page.locator("#log .user")).to_have_text("<img src=x onerror=alert(1)>")
    assert not page.locator("#log img").count()


def test_the_key(page, loaded, tokenizer):
    settings = dataclasses.replace(SETTINGS, api_key="secret")
    with running(loaded, tokenizer, settings) as locked:
        page.goto(locked.url)
        expect(page.locator("#log .error")).to_contain_text("API key is missing")
        page.fill("#key", "secret")
        page.fill("#tokens", "5")
        ask(page, "Hello?")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.locator("#n-answer")).to_have_text("5")
