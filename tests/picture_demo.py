"""Makes the documentation's pictures of the demo, and measures how long after a move of its slider the page shows it.

python tests/picture_demo.py docs/images
"""

import argparse
import statistics
import time
from pathlib import Path

from browser import PHONE_HEIGHT, PHONE_WIDTH, chromium, running_demo, set_screen
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


MOVES = 15
# From the key's press to the first change of the pictures, and to the first result that has times again.
WATCH = """
const result = document.querySelector('#result');
const pictures = () => [...result.querySelectorAll('.stages img')].map(image => image.src).join();
addEventListener('keydown', () => { window.seen = {start: performance.now(), before: pictures()}; }, true);
new MutationObserver(() => {
    if (!window.seen || window.seen.times) return;
    if (!window.seen.pictures && pictures() !== window.seen.before) window.seen.pictures = performance.now();
    if (window.seen.pictures && result.innerText.includes('times as fast')) window.seen.times = performance.now();
}).observe(result, {subtree: true, childList: true, attributes: true, characterData: true});
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write demo.png and demo-phone.png")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with running_demo() as url, chromium() as driver:
        set_screen(driver, 1200, 860)
        driver.get(url)
        wait_for_times(driver)
        save_screenshot(driver, folder / "demo.png")
        to_pictures, to_times = measure(driver)
        set_screen(driver, PHONE_WIDTH, PHONE_HEIGHT, mobile=True)
        driver.find_element(By.CSS_SELECTOR, "button[aria-label='glass 1']").click()
        WebDriverWait(driver, 60).until(lambda _: "<strong>glass</strong>" in driver.page_source)
        wait_for_times(driver)
        set_screen(driver, PHONE_WIDTH, driver.execute_script("return document.body.scrollHeight"), mobile=True)
        save_screenshot(driver, folder / "demo-phone.png")
    print(f"{MOVES} moves of the slider; milliseconds, median (fastest to slowest):")
    for name, times in (("until the pictures change", to_pictures), ("until times are measured", to_times)):
        print(f"{name}: {statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})")


def wait_for_times(driver) -> None:
    WebDriverWait(driver, 60).until(lambda _: "times as fast" in driver.page_source)


def measure(driver) -> tuple[list[float], list[float]]:
    driver.execute_script(WATCH)
    slider = driver.find_element(By.CSS_SELECTOR, "#budget input[type=range]")
    to_pictures, to_times = [], []
    for move in range(MOVES):
        slider.send_keys(Keys.ARROW_LEFT if move % 2 else Keys.ARROW_RIGHT)
        seen = WebDriverWait(driver, 60).until(lambda _: driver.execute_script("return window.seen?.times && seen"))
        to_pictures.append(seen["pictures"] - seen["start"])
        to_times.append(seen["times"] - seen["start"])
    return to_pictures, to_times


def save_screenshot(driver, file: Path) -> None:
    """With a palette of 256 colours, which makes the file small."""
    time.sleep(1)  # for transitions to end
    driver.save_screenshot(str(file))
    with Image.open(file) as screenshot:
        small = screenshot.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


if __name__ == "__main__":
    main()
