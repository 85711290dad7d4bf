"""The demo page in a headless Chromium, operated like a person would: by pointer, by keyboard, on a phone."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("gradio")
pytest.importorskip("selenium")

import httpx
from browser import (
    ALLOW_CAMERA,
    DEMO,
    PHONE_HEIGHT,
    PHONE_WIDTH,
    chromium,
    chromium_is_there,
    running_demo,
    set_screen,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from videos import moving_square, save_video_model, write_video


pytestmark = pytest.mark.skipif(not chromium_is_there(), reason="there is no chromium with chromedriver: make browser")

MAX_BYTES = 10 * 1024**2
PATIENCE = 60  # seconds, on a busy machine
CLICK_TWO = ";".join(
    f"document.querySelector(`button[aria-label='{name}']`).click()" for name in ("metal 1", "paper 1")
)
# The next request of the page arrives after the one that follows it.
HOLD_ONE_REQUEST = """
    const send = window.fetch;
    let release;
    const following = new Promise((resolve) => { release = resolve; });
    window.sent = 0;
    window.fetch = async (url, ...options) => {
        if (!String(url).includes("queue/join")) return send(url, ...options);
        const number = ++window.sent;
        if (number === 1) await following;
        const response = await send(url, ...options);
        if (number === 2) release();
        return response;
    };"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory):
    """Serves the Space as it is uploaded to the Hub, with a page for clips."""
    folder = tmp_path_factory.mktemp("space")
    subprocess.run(["make", "--silent", "space", f"SPACE={folder}"], cwd=DEMO.parent, check=True)
    video_model = save_video_model(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=8, hidden_size=32)
    with running_demo("--video_model_name_or_path", str(video_model), folder=folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser, url):
    """The page, newly opened, with the result of its first example."""
    set_screen(browser, 1200, 900)
    browser.get(url)
    return Page(browser)


class Page:
    def __init__(self, browser) -> None:
        self.browser = browser
        self.wait_for_times()

    def wait(self, condition):
        return WebDriverWait(self.browser, PATIENCE).until(lambda _: condition())

    def wait_for_times(self) -> None:
        self.wait(lambda: "times as fast" in self.result)

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def query(self, script: str):
        return self.browser.execute_script(f"return {script}")

    @property
    def result(self) -> str:
        return self.query("document.querySelector('#result')?.innerText ?? ''")

    @property
    def pictures(self) -> list[str]:
        return self.query("[...document.querySelectorAll('.stages img')].map(image => image.src)")

    @property
    def captions(self) -> list[str]:
        return self.query("[...document.querySelectorAll('.stages img')].map(image => image.alt)")

    @property
    def cells(self) -> list[list[str]]:
        """The table: label, FLOPs and milliseconds of the dense and the pruned model."""
        rows = "[...document.querySelectorAll('.comparison tbody tr')]"
        return self.query(f"{rows}.map(row => [...row.querySelectorAll('td')].map(cell => cell.innerText))")

    @property
    def slider(self):
        return self.find("#budget input[type=range]")

    @property
    def errors(self) -> str:
        return self.query("[...document.querySelectorAll('.toast-body')].map(toast => toast.innerText).join(' ')")

    def upload(self, file: Path) -> None:
        self.find("input[type=file]").send_keys(str(file))

    def change(self, act) -> None:
        """Calls `act`, and waits until the pictures have changed and the times are shown."""
        before = self.pictures
        act()
        self.wait(lambda: self.pictures and self.pictures != before)
        self.wait_for_times()


def kept(page: Page) -> list[int]:
    """Number of patches left after each stage, according to the captions."""
    return [int(caption.split(": ")[1].split(" of ")[0]) for caption in page.captions[1:]]


def test_the_first_example_is_there_without_a_click(page) -> None:
    (dense_label, pruned_label), (dense_flops, pruned_flops), (dense_ms, pruned_ms) = page.cells
    assert dense_label.startswith("cardboard")
    assert pruned_label.startswith("cardboard")
    assert dense_flops == "850.3 M"
    assert pruned_flops.splitlines()[-1].startswith("42")
    assert float(dense_ms) > 0
    assert float(pruned_ms.splitlines()[0]) > 0
    assert len(page.pictures) == 4
    assert page.captions[0] == "What the model sees: 324 patches"
    assert 324 > kept(page)[0] > kept(page)[1] > kept(page)[2] > 0


def test_an_example_is_chosen_by_pointer(page) -> None:
    page.change(page.find("button[aria-label='glass 1']").click)
    assert [cell.split()[0] for cell in page.cells[0]] == ["glass", "glass"]
    # Before the first is answered, the second is clicked.
    page.browser.execute_script(CLICK_TWO)
    page.wait(lambda: page.cells[0][0].startswith("paper"))
    page.wait_for_times()
    assert page.cells[0][0].startswith("paper")


def test_the_last_click_counts_even_if_it_arrives_first(page) -> None:
    page.browser.execute_script(HOLD_ONE_REQUEST + CLICK_TWO)
    page.wait(lambda: page.query("window.sent") == 4)  # both were answered: then the times are asked for
    page.wait(lambda: not page.cells[0][0].startswith("cardboard"))
    page.wait_for_times()
    assert page.cells[0][0].startswith("paper")


def test_a_method_is_chosen(page) -> None:
    before = kept(page)
    at_random = page.browser.find_elements(By.CSS_SELECTOR, "#method label")[-1]
    assert at_random.text == "Drop at random"
    page.change(at_random.click)
    assert kept(page) == before
    pictures = page.pictures
    page.change(page.find("button[aria-label='cardboard 2']").click)
    page.change(page.find("button[aria-label='cardboard 1']").click)
    assert page.pictures[0] == pictures[0]
    assert page.pictures[1] != pictures[1], "it is drawn anew"


def test_a_picture_is_taken(page) -> None:
    page.find("#camera button").click()
    page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, ALLOW_CAMERA))
    page.find(ALLOW_CAMERA).click()
    page.wait(lambda: page.query("document.querySelector('#camera video').readyState") == 4)
    # Gradio looks for other cameras first, and forgets to turn this one off if it is removed meanwhile.
    page.browser.execute_async_script("navigator.mediaDevices.enumerateDevices().then(() => arguments[0]())")
    page.browser.execute_script("window.stream = document.querySelector('#camera video').srcObject")
    assert page.query("stream.active")
    page.find("#camera button").click()
    page.wait(lambda: not page.query("stream.active"))  # the camera is off
    page.find("#camera button").click()
    page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, ALLOW_CAMERA))
    page.find(ALLOW_CAMERA).click()
    page.wait(lambda: page.query("document.querySelector('#camera video').readyState") == 4)
    page.change(page.find("#camera button[aria-label='capture photo']").click)
    assert len(page.pictures) == 4


def test_a_clip_is_uploaded_on_the_page_for_videos(page, url, tmp_path) -> None:
    page.find("a[href$='videos']").click()
    page.wait(lambda: page.query("location.pathname").endswith("/videos"))
    page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#upload ~ input[type=file], input[type=file]"))
    write_video(tmp_path / "clip.mp4", moving_square(20))
    page.upload(tmp_path / "clip.mp4")
    page.wait_for_times()
    assert len(page.pictures) == 4
    assert page.captions[0] == "What the model sees: 48 patches"
    before = kept(page)
    page.change(lambda: page.slider.send_keys(Keys.END))
    assert kept(page)[-1] < before[-1]
    (tmp_path / "text.mp4").write_text("no video")
    page.upload(tmp_path / "text.mp4")
    page.wait(lambda: "text.mp4 cannot be read" in page.errors)
    assert len(page.pictures) == 4


def test_everything_is_reached_and_done_by_keyboard(page) -> None:
    """Tabs through the page from the top: examples, upload button, number, slider."""
    reached = []
    for _ in range(30):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        element = page.browser.switch_to.active_element
        reached.append(element.get_attribute("aria-label") or element.text)
        if reached[-1] == "trash 2":
            assert page.query("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is not seen"
            page.change(lambda: page.browser.switch_to.active_element.send_keys(Keys.ENTER))
            assert page.cells[0][1]
        if reached[-1].startswith("range slider"):
            break
    assert {"cardboard 1", "trash 1", "Upload an image"} <= set(reached)
    before = kept(page)
    page.change(lambda: page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT * 10))
    page.wait(lambda: "52." in page.cells[1][1])
    assert kept(page)[-1] < before[-1]
    page.change(lambda: page.browser.switch_to.active_element.send_keys(Keys.HOME))
    page.wait(lambda: len(page.pictures) == 1)
    assert page.cells[0][0] == page.cells[0][1], "a budget of 0 is the dense model"
    assert "0.0% fewer" in page.cells[1][1]
    page.change(lambda: page.browser.switch_to.active_element.send_keys(Keys.END))
    page.wait(lambda: "60." in page.cells[1][1])
    number = page.find("#budget input[type=number]")
    number.send_keys(Keys.BACKSPACE * 2)
    page.wait(lambda: "0.0% fewer" in page.cells[1][1])
    number.send_keys("30")
    page.wait(lambda: "30." in page.cells[1][1])
    assert page.errors == ""


def test_an_image_is_uploaded(page, tmp_path) -> None:
    file = tmp_path / "grey.webp"
    Image.new("RGB", (300, 200), (90, 120, 150)).save(file)
    page.change(lambda: page.upload(file))
    assert len(page.pictures) == 4


def too_large(file: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)).save(file)


BAD_UPLOADS = {
    "large.png": (too_large, "exceed the maximum allowed size of 10"),
    "text.png": (lambda file: file.write_text("Not Found"), "text.png is not an image that can be read: JPEG, PNG and"),
    "bomb.png": (
        lambda file: Image.new("1", (40_000, 1_000)).save(file),
        "bomb.png has 40000 × 1000 pixels; at most 30",
    ),
    "notes.txt": (lambda file: file.write_text("notes"), "Invalid file type: notes.txt"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused_and_nothing_is_lost(name, page, tmp_path) -> None:
    write, message = BAD_UPLOADS[name]
    write(tmp_path / name)
    before = page.pictures
    page.upload(tmp_path / name)
    page.wait(lambda: page.errors)
    assert message in page.errors
    assert page.pictures == before
    page.change(page.find("button[aria-label='paper 1']").click)
    assert page.cells[0][0].startswith("paper")


def test_the_server_refuses_what_a_browser_would_not_have_sent(url) -> None:
    for size, status in ((MAX_BYTES // 2, 200), (MAX_BYTES + 1, 413)):
        answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("image.png", bytes(size))}, timeout=PATIENCE)
        assert answer.status_code == status


def test_a_phone_shows_everything_without_scrolling_sideways(page) -> None:
    set_screen(page.browser, PHONE_WIDTH, PHONE_HEIGHT, mobile=True)
    page.wait(lambda: page.query("innerWidth") == PHONE_WIDTH)
    page.change(page.find("button[aria-label='metal 1']").click)
    assert page.query("document.documentElement.scrollWidth") == PHONE_WIDTH
    # A long label without a space: the page is taller, not wider.
    page.browser.execute_script("document.querySelector('.comparison strong').textContent = 'x'.repeat(99)")
    assert page.query("document.documentElement.scrollWidth") == PHONE_WIDTH
    right_edges = page.query("[...document.querySelectorAll('#result *')].map(e => e.getBoundingClientRect().right)")
    assert max(right_edges) <= PHONE_WIDTH
    # The slider stays in sight of the table that it changes.
    page.browser.execute_script("document.querySelector('.comparison').scrollIntoView({block: 'end'})")
    top = page.query("document.querySelector('#budget').getBoundingClientRect().top")
    assert -1 < top < PHONE_HEIGHT - 100


def test_nobody_else_is_asked_for_anything(page, url) -> None:
    log = (json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance"))
    addresses = [entry["params"]["request"]["url"] for entry in log if entry["method"] == "Network.requestWillBeSent"]
    own = ("data:", "blob:", "chrome:", url)
    assert any(address.startswith(url) for address in addresses)
    assert [address for address in addresses if not address.startswith(own)] == []
