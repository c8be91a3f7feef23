"""The page in a real Chromium, against the real API, a conductor, and stages with tiny networks."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from api_server import server_for, serving
from local_stages import LocalStages

from tccp.files import Folder
from tccp.media import read_frames
from tccp.roundtable import identity_path, read_truth, write_clips
from tccp.serving.conductor import Conductor, Rules
from tccp.serving.publishing import film_file
from tccp.serving.stage_service import WindowMade
from tccp.serving.store import JobStore
from tccp.serving.weight_versions import pin

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
pytest_plugins = ["tiny_fixtures", "api_fixtures"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
CONSENT = "drawn people: nobody needs to agree"
WAIT_MS = 60_000
DROP = """files => {
    const data = new DataTransfer();
    for (const [name, type, content] of files) {
        const bytes = Uint8Array.from(atob(content), one => one.charCodeAt(0));
        data.items.add(new File([bytes], name, {type}));
    }
    document.querySelector("main").dispatchEvent(
        new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""
TIMES = "() => [...document.querySelectorAll('#film-player video')].map(one => one.currentTime)"
SETTLED = "() => [...document.querySelectorAll('#film-player video')].every(one => !one.seeking && one.readyState >= 2)"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of film that browsers can play, with truth and identity picture beside it."""
    (path,) = write_clips(tmp_path_factory.mktemp("clip"), 1, 1.0, seed=4, width=128, height=96)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-background-networking", "--autoplay-policy=no-user-gesture-required"]
        opened = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@contextmanager
def page_at(browser: Any, url: str, expected: str = r"$^", **options: Any) -> Iterator[Any]:
    """A tab with the page. Errors of its scripts, and what its content policy blocks, fail the test.

    expected: pattern of messages on the console that the test causes.
    """
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(url)
    yield page
    context.close()
    assert [text for text in problems if not re.search(expected, text)] == []


class GatedStages(LocalStages):
    """Makes the first window of a job; the others when the gate is open, so that a test sees a film in work."""

    def __init__(self, store: JobStore, storage: Folder):
        super().__init__(store, storage)
        self.gate = threading.Event()

    async def faces(self, *given: Any) -> WindowMade:
        if self.made:
            await asyncio.to_thread(self.gate.wait, WAIT_MS / 1000)
        return await super().faces(*given)


@contextmanager
def conducted(store: JobStore, storage: Folder, stages: LocalStages) -> Iterator[None]:
    """A conductor works in a thread within the context."""
    stop = threading.Event()

    async def work() -> None:
        task = asyncio.create_task(Conductor(store, storage, stages, Rules(poll_s=0.05)).run())
        while not stop.is_set():
            await asyncio.sleep(0.05)
            assert not task.done(), task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(work(),))  # Playwright has its own loop in this one
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def heads_of(clip: Path) -> Any:
    """Finds two heads in any scene: the clip's, and one more."""

    async def find(scene: Path) -> tuple[int, int, bytes, list[list[float]]]:
        frame = np.ascontiguousarray(next(iter(read_frames(clip))))
        height, width = frame.shape[:2]
        jpeg = bytes(cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[1])
        return width, height, jpeg, [read_truth(clip).head_box[0].tolist(), [1.0, 40.0, 31.0, 70.0]]

    return find


def dropped(path: Path, kind: str) -> list[str]:
    return [path.name, kind, base64.b64encode(path.read_bytes()).decode()]


def test_a_film_is_made_watched_and_made_again(
    browser: Any, clip: Path, weights: Path, store: JobStore, server_storage: Folder, tmp_path: Path
) -> None:
    stages = GatedStages(store, server_storage)
    models = {"default": pin(weights, server_storage)}
    server = server_for(store, server_storage, models=models, find_heads=heads_of(clip))
    with (
        serving(server) as url,
        conducted(store, server_storage, stages),
        page_at(browser, url, viewport={"width": 1280, "height": 900}) as page,
    ):
        try:
            page.click("#start")
            assert page.inner_text("[data-param=scene] .error") == "Choose a scene."
            assert page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"

            files = [dropped(clip, "video/mp4"), dropped(clip, "video/mp4"), dropped(identity_path(clip), "image/png")]
            page.evaluate(DROP, files)
            page.wait_for_selector(".mark >> nth=1")
            page.check("[name=identity_box]")
            page.fill("#consent", CONSENT)
            page.click("#start")
            assert page.inner_text("#head-field .error") == "Pick the head to replace, or draw a box."

            x0, y0, x1, y1 = read_truth(clip).head_box[0].tolist()
            frame = page.locator("#head-frame")
            frame.scroll_into_view_if_needed()
            area = frame.bounding_box()
            scale = area["width"] / 128
            page.mouse.move(area["x"] + x0 * scale, area["y"] + y0 * scale)
            page.mouse.down()
            page.mouse.move(area["x"] + x1 * scale, area["y"] + y1 * scale, steps=4)
            page.mouse.up()
            drawn = [int(page.input_value(f"#box-{i}")) for i in range(4)]
            np.testing.assert_allclose(drawn, [x0, y0, x1, y1], atol=1)
            page.keyboard.press("ArrowLeft")  # the box that was drawn has the focus
            assert int(page.input_value("#box-0")) == drawn[0] - 1
            page.keyboard.press("ArrowRight")

            page.click("#options summary")
            page.fill("#seed", "3")
            page.fill("#prompt", "A first try")
            page.click("#start")
            page.wait_for_selector("#film-latest:not([hidden])")
            assert "The head is being generated" in page.inner_text("#film-stage")
            assert page.evaluate("document.querySelector('#film-latest').naturalWidth") == 128
            (job,) = store.listed(None, 10)
            assert (job.spec["consent"], job.spec["seed"], job.spec["prompt"]) == (CONSENT, 3, "A first try")
            assert job.spec["box"] == ",".join(map(str, drawn)) and job.spec["identity_box"] == "whole"
            assert job.status == "in_progress"
        finally:
            stages.gate.set()

        page.wait_for_selector("#film-player video")
        page.wait_for_function(SETTLED)
        for _ in range(4):
            page.click("[aria-label='One frame on']")
        page.wait_for_function(SETTLED)
        before, after = page.evaluate(TIMES)
        assert after == pytest.approx(4 / 25, abs=0.01), "the film is where it was sent"
        assert before == pytest.approx(after, abs=0.01), "the scene is in step"
        page.click(".play")
        page.wait_for_function("() => document.querySelector('.after video').ended")
        assert page.evaluate("document.querySelector('.after video').duration") == pytest.approx(1.0, abs=0.05)
        assert "AI-generated" in page.inner_text(".after figcaption")
        page.get_by_role("button", name="Wipe").click()
        assert page.locator(".wipe").is_visible()

        ended = store.get(job.id)
        assert ended is not None and ended.result is not None and server_storage.local is not None
        with page.expect_download() as saved:
            page.click("#film-downloads a >> nth=0")
        place = film_file(ended.result, "film.mp4")
        assert saved.value.path().read_bytes() == (server_storage.local / str(place)).read_bytes()

        page.click("#film-remix summary")
        with page.expect_download() as saved:
            page.click("#remix-landmarks")
        edited = tmp_path / "edited.jsonl"
        saved.value.save_as(edited)
        page.set_input_files("#remix-field input", edited)
        page.click("#remix button[type=submit]")
        page.wait_for_function("id => location.hash.length > 1 && location.hash !== '#' + id", arg=job.id)
        page.wait_for_selector("#film-player video")
        remix, _ = store.listed(None, 10)
        assert (remix.remix_of, remix.status, remix.spec["consent"]) == (job.id, "completed", CONSENT)

        page.goto(f"{url}/")
        page.reload()
        page.wait_for_selector("#list li >> nth=1")
        assert "Ready" in page.inner_text("#list li >> nth=0")
        page.click("#list li >> nth=0 >> button")
        page.click("#confirm-yes")
        page.wait_for_selector("#list li >> nth=1", state="detached")
        assert [one.id for one in store.listed("local", 10)] == [job.id]
    stages.close()


def test_tokens_errors_and_small_screens(browser: Any, clip: Path, store: JobStore, server_storage: Folder) -> None:
    """On a phone: a person signs in, reads the API's errors beside their fields, and cancels a film that waits."""
    server = server_for(store, server_storage, find_heads=heads_of(clip), tokens={"secret": "ann"})
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with serving(server) as url, page_at(browser, url, expected=r"status of 40[01]", **phone) as page:
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#sign-in .error")
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#list-empty:not([hidden])")

        page.set_input_files("[data-param=scene] input", {"name": "empty.mp4", "mimeType": "video/mp4", "buffer": b""})
        page.wait_for_selector("[data-param=scene] > .error")
        assert "the file is empty" in page.inner_text("[data-param=scene] > .error")
        page.set_input_files("[data-param=scene] input", clip)
        page.set_input_files("[data-param=audio] input", clip)
        page.set_input_files("[data-param=identity] input", identity_path(clip))
        page.wait_for_selector(".mark >> nth=1")
        assert page.locator("[data-param=scene] > .error").count() == 0
        page.tap(".mark >> nth=1")
        page.fill("#consent", CONSENT)
        page.click("#options summary")
        page.check("[name=one_stage]")
        page.check("[name=redraw]")
        page.click("#start")
        page.wait_for_selector("#form-error:not([hidden])")
        assert "redraw" in page.inner_text("#form-error")
        assert page.evaluate("document.documentElement.scrollWidth") == 360, "nothing is wider than the screen"
        page.uncheck("[name=redraw]")
        page.click("#start")
        page.wait_for_selector("#film-status[data-status=queued]")
        (job,) = store.listed("ann", 10)
        assert job.spec["person"] == [16.0, 55.0], "the middle of the second head"
        assert page.inner_text("#film-stage") == "Next in the queue"

        page.click("#film-delete")
        page.click("#confirm-yes")
        page.wait_for_selector("#film-status[data-status=canceled]")
        cancelled = store.get(job.id)
        assert cancelled is not None and cancelled.status == "canceled"
        assert page.evaluate("document.documentElement.scrollWidth") == 360
