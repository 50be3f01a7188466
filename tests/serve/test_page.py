"""The web page in headless Chromium, on a wide and a narrow screen. The service is in this process.

It needs the extra `page-test` and a Chromium of the system, such as that of `apt install chromium`:

    pytest -m slow tests/serve/test_page.py
"""

from __future__ import annotations

import base64
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")
pytest.importorskip("playwright.sync_api", reason="the extra `page-test` is not installed")

import uvicorn
from playwright import sync_api
from served_index import InProcess, make_index, make_run

from ray_dmml.serve.app import build_app
from ray_dmml.serve.settings import LOOPBACK, ServeSettings, hashed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUERY = "class07/2.png"

pytestmark = [
    pytest.mark.ray,  # Chromium is a process
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium in PATH"),
]


@pytest.fixture(scope="module")
def folders(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("served")
    run = make_run(image_folder, folder / "run")
    return [str(make_index(run, image_folder, folder / name, name)) for name in ("ensemble", "peer0")]


@contextmanager
def served(folders: list[str], **settings: Any) -> Iterator[str]:
    """The address of the page."""
    limits = ServeSettings(indexes=folders, allowed_hosts=list(LOOPBACK), **settings)
    server = uvicorn.Server(uvicorn.Config(build_app(InProcess(limits), limits), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    try:
        yield f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def page_of(address: str, width: int, height: int) -> Iterator[Any]:
    """A page that has reported no error and loaded nothing from elsewhere."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(30_000)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: None if is_own(request.url, address) else errors.append(request.url))
        page.goto(address)
        yield page
        browser.close()
        assert not errors, errors


def is_own(url: str, address: str) -> bool:
    return url.startswith((address, f"blob:{address}", "data:"))


def transfer_of(page: Any, file: Path) -> Any:
    """The file as a browser hands it to the page."""
    content = base64.b64encode(file.read_bytes()).decode()
    return page.evaluate_handle(
        """([content, name]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            return transfer;
        }""",
        [content, file.name],
    )


def drop(page: Any, file: Path) -> None:
    for event in ("dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": transfer_of(page, file)})


def paste(page: Any, file: Path) -> None:
    event = "(clipboardData) => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData, bubbles: true}))"
    page.evaluate(event, transfer_of(page, file))


def shown(page: Any, number: int = 0) -> list[str]:
    """The paths of a result, whose pictures are all there. A search that has begun is waited for."""
    section = page.locator("#results:not(.waiting) section").nth(number)
    section.locator(".hit").first.wait_for()
    for image in section.locator(".hit img").all():
        image.scroll_into_view_if_needed()
        page.wait_for_function("(image) => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    return [str(path) for path in section.locator(".path").all_text_contents()]


def take(page: Any, name: str) -> None:
    """A screenshot, where a person wants to look at it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_drop_look_and_click(folders: list[str], image_folder: Path, width: int, height: int) -> None:
    """A photo is dropped, its neighbours are shown by both indexes, one is clicked, and back leads back."""
    with served(folders) as address, page_of(address, width, height) as page:
        assert len(shown(page)) == 14  # to begin with
        take(page, f"start-{width}")
        drop(page, image_folder / QUERY)
        page.locator("#results h2").first.wait_for()
        first = shown(page)
        assert first[0] == QUERY and len(first) == 20
        assert page.locator("#results h2").all_text_contents() == ["ensemble", "peer0"]
        assert page.locator("#query-name").text_content() == "2.png"
        take(page, f"dropped-{width}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for image in page.locator("img:visible").all():
            assert image.get_attribute("alt")

        page.locator(".hit").nth(1).click()
        page.wait_for_function("(path) => document.querySelector('#query-name').textContent === path", arg=first[1])
        second = shown(page)
        assert first[1] not in second and address + "#path=" in page.url
        page.go_back()
        page.wait_for_function("() => document.querySelector('#query-name').textContent === '2.png'")
        assert shown(page) == first

        page.locator("#filter").fill("class03/")
        page.keyboard.press("Tab")  # away from the field
        page.wait_for_function(
            "() => document.querySelectorAll('#results section')[0].querySelectorAll('.hit').length === 5"
        )
        assert all(path.startswith("class03/") for path in shown(page))
        page.locator("#compare input").nth(1).uncheck()
        page.wait_for_function("() => document.querySelectorAll('#results section').length === 1")

        page.locator(".hit").first.focus()
        page.keyboard.press("Enter")  # a keyboard alone is enough
        page.wait_for_function("() => document.querySelector('#query-name').textContent.startsWith('class03/')")
        page.set_input_files("#file", str(image_folder / "class05/1.png"))
        page.wait_for_function("() => document.querySelector('#query-name').textContent === '1.png'")


def test_paste_number_and_link(folders: list[str], image_folder: Path) -> None:
    """A photo is pasted, the number of images is chosen, and a link leads to the search for an image of the index."""
    with served(folders) as address, page_of(address, 1280, 900) as page:
        page.locator("#drop").wait_for()
        paste(page, image_folder / QUERY)
        page.locator("#results h2").first.wait_for()
        assert shown(page)[0] == QUERY
        page.locator("#k").select_option("10")
        page.wait_for_function("() => document.querySelectorAll('#results section:first-child .hit').length === 10")
        page.goto(f"{address}#path=class03%2F1.png")
        page.reload()
        page.wait_for_function("() => document.querySelector('#query-name').textContent === 'class03/1.png'")
        assert "class03/1.png" not in shown(page)


def test_only_a_busy_service_is_asked_again(folders: list[str], image_folder: Path) -> None:
    """Without a Retry-After, the image may have ended replicas, and is not sent again."""
    refused = pytest.raises(AssertionError, match="503")  # Chromium reports the status as an error
    with served(folders) as address, refused, page_of(address, 390, 844) as page:
        answers = [{"Retry-After": "1"}, {}]

        def refuse(route: Any) -> None:
            route.fulfill(status=503, headers=answers.pop(0), json={"detail": "no replica is left"})

        page.locator("#drop").wait_for()
        page.route("**/search*", refuse)
        paste(page, image_folder / QUERY)
        page.get_by_text("No replica is left.").wait_for()
        assert not answers


def test_refusals_are_shown(folders: list[str], tmp_path: Path) -> None:
    """What is no image, and what is too large, is said in a sentence."""
    svg, large = tmp_path / "a.svg", tmp_path / "b.png"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    large.write_bytes(bytes(200_000))
    with served(folders, max_upload_bytes=100_000) as address, page_of(address, 390, 844) as page:
        page.locator("#drop").wait_for()
        page.set_input_files("#file", str(large))
        page.get_by_text("b.png is too large: at most 0.1 MB are read.").wait_for()
    with served(folders) as address, pytest.raises(AssertionError, match="415"), page_of(address, 390, 844) as page:
        page.locator("#drop").wait_for()
        page.set_input_files("#file", str(svg))
        page.get_by_text("It is not an image in a known format.").wait_for()
        take(page, "refused-390")  # Chromium reports the status 415 as an error


def test_with_a_token(folders: list[str], image_folder: Path) -> None:
    """The page asks for it, also after a wrong one, and then shows pictures, too."""
    refused = pytest.raises(AssertionError, match="401")  # Chromium reports the status as an error
    with served(folders, token_sha256=hashed("sesame")) as address, refused, page_of(address, 1280, 900) as page:
        page.locator("#token").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_placeholder("the last one was not accepted").wait_for()
        take(page, "token-1280")
        page.locator("#token").fill("sesame")
        page.keyboard.press("Enter")
        page.locator("#drop").wait_for()
        drop(page, image_folder / QUERY)
        page.locator("#results h2").first.wait_for()
        assert shown(page)[0] == QUERY
