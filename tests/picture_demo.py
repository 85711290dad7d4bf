"""Takes screenshots of the demo for the documentation. Also measures, on a computer and on a phone, how long it takes
to show a result after the slider moves, the camera takes a picture or a photo is uploaded.

python tests/picture_demo.py docs/images
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from browser import ALLOW_CAMERA, DEMO, PHONE_HEIGHT, PHONE_WIDTH, chromium, running_demo, set_screen
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from videos import moving_square, save_video_model, write_video


sys.path.insert(0, str(DEMO))

import app


TURNS = 10  # of each
BOTTLE = DEMO / "examples" / "waste" / "glass_1.jpg"
CAMERA_SIZE, PHOTO_SIZE = (480, 640), (3024, 4032)  # of a camera's film, and of a phone's photo of 12 megapixels
VIDEO_MODEL = {"image_size": 64, "num_frames": 8, "num_hidden_layers": 8, "hidden_size": 64}
# From an event to the first result, which has the label and the pictures, and to the one with times.
WATCH = """
const result = document.querySelector('#result');
for (const name of ['keydown', 'click', 'change'])
    addEventListener(name, () => { if (window.seen === null) window.seen = {start: performance.now()}; }, true);
new MutationObserver(() => {
    if (!window.seen || window.seen.times) return;
    if (result.innerText.includes('measuring')) window.seen.label ??= performance.now();
    else if (window.seen.label) window.seen.times = performance.now();
}).observe(result, {subtree: true, childList: true, attributes: true, characterData: true});
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the pictures")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        film = enlarge(BOTTLE, CAMERA_SIZE, Path(scratch) / "film.mjpeg")
        # Two files, because a browser does not upload the same file again.
        photos = [enlarge(BOTTLE, PHOTO_SIZE, Path(scratch) / f"photo{number}.jpg") for number in range(2)]
        with running_demo() as url, chromium(film) as driver:
            set_screen(driver, 1200, 860)
            open_page(driver, url)
            save_screenshot(driver, folder / "demo.png")
            report("moves of the slider", move_slider(driver))
            set_screen(driver, PHONE_WIDTH, PHONE_HEIGHT, mobile=True)
            open_page(driver, url)
            report("pictures of a phone's camera", take_pictures(driver))
            whole_page(driver, PHONE_WIDTH)
            save_screenshot(driver, folder / "demo-phone.png")
            report(f"uploads of a photo of {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]} pixels", upload(driver, photos))
        model = save_video_model(Path(scratch) / "model", **VIDEO_MODEL)
        with running_demo("--video_model_name_or_path", str(model)) as url, chromium() as driver:
            set_screen(driver, 1200, 860)
            picture_clip(driver, url, Path(scratch))
            save_screenshot(driver, folder / "demo-videos.png")
        for name, file in (("camera picture", film), ("photo", photos[0])):
            print(f"the server's own CPU time, from a {name} to its label and pictures: {cpu_times(file)}")


def enlarge(file: Path, size: tuple[int, int], target: Path) -> Path:
    """Enlarges an image and adds camera noise; without it, the file would be small."""
    with Image.open(file) as image:
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)
    pixels = pixels + np.random.default_rng(0).normal(0, 4, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, "JPEG", quality=90)
    return target


def open_page(driver, url: str) -> None:
    driver.get(url)
    wait(driver, lambda: "times as fast" in driver.page_source)
    driver.execute_script(WATCH)


def wait(driver, condition: Callable):
    return WebDriverWait(driver, 60, poll_frequency=0.05).until(lambda _: condition())


def measure(driver, act: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds from the event until the label and pictures are shown, and until the times are shown."""
    driver.execute_script("window.seen = null")
    act()
    seen = wait(driver, lambda: driver.execute_script("return window.seen?.times && seen"))
    return seen["label"] - seen["start"], seen["times"] - seen["start"]


def move_slider(driver) -> list[tuple[float, float]]:
    slider = driver.find_element(By.CSS_SELECTOR, "#budget input[type=range]")
    keys = (Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    return [measure(driver, lambda key=keys[move % 2]: slider.send_keys(key)) for move in range(TURNS)]


def take_pictures(driver) -> list[tuple[float, float]]:
    """Takes pictures with the camera and leaves the last one on the page."""
    find = driver.find_element
    find(By.CSS_SELECTOR, "#camera button").click()
    times = []
    for shot in range(TURNS):
        if shot:
            find(By.CSS_SELECTOR, "#camera button[aria-label='Remove Image']").click()
        wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, ALLOW_CAMERA))
        find(By.CSS_SELECTOR, ALLOW_CAMERA).click()
        wait(driver, lambda: driver.execute_script("return document.querySelector('#camera video')?.readyState === 4"))
        times.append(measure(driver, find(By.CSS_SELECTOR, "#camera button[aria-label='capture photo']").click))
    return times


def upload(driver, photos: list[Path]) -> list[tuple[float, float]]:
    field = driver.find_element(By.CSS_SELECTOR, "input[type=file]")
    return [measure(driver, lambda file=photos[turn % 2]: field.send_keys(str(file))) for turn in range(TURNS)]


def picture_clip(driver, url: str, scratch: Path) -> None:
    write_video(scratch / "clip.mp4", moving_square(48))
    driver.get(f"{url}videos")
    wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(scratch / "clip.mp4"))
    wait(driver, lambda: "times as fast" in driver.page_source)
    whole_page(driver, 1200)


def report(what: str, times: list[tuple[float, float]]) -> None:
    print(f"{len(times)} {what}; milliseconds, median (fastest to slowest):")
    for name, each in zip(("label and pictures", "times measured, too"), zip(*times, strict=True), strict=True):
        print(f"    {name}: {statistics.median(each):.0f} ({min(each):.0f} to {max(each):.0f})", flush=True)


def cpu_times(file: Path) -> str:
    page = app.Page(app.PrunedModel(str(app.EXAMPLE_MODEL)))
    times = []
    for _ in range(TURNS):
        start = time.process_time()
        page.upload(app.Session(), 1, app.FIRST_PERCENT, next(iter(page.model.methods)), str(file))
        times.append(1000 * (time.process_time() - start))
    return f"{statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})"


def whole_page(driver, width: int) -> None:
    set_screen(driver, width, driver.execute_script("return document.body.scrollHeight"), mobile=width == PHONE_WIDTH)


def save_screenshot(driver, file: Path) -> None:
    """Saves a screenshot with a palette of 256 colours, to keep the file small."""
    time.sleep(1)  # for transitions to end
    driver.save_screenshot(str(file))
    with Image.open(file) as screenshot:
        small = screenshot.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


if __name__ == "__main__":
    main()
