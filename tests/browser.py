"""Starts the demo server and a headless Chromium, and drives the page."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ports import free_port
from selenium import webdriver
from selenium.webdriver.chrome.service import Service


DEMO = Path(__file__).resolve().parents[1] / "demo"
PHONE_WIDTH, PHONE_HEIGHT = 390, 844
ALLOW_CAMERA = "#camera [title='grant webcam access'] button"
START_SECONDS = 600  # on a busy machine


def chromium_is_there() -> bool:
    return None not in (shutil.which("chromium"), shutil.which("chromedriver"))


@contextmanager
def running_demo(*options: str, folder: Path = DEMO) -> Iterator[str]:
    """Serves a folder's `app.py` on the loopback interface and yields its address."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("w+") as log:
        environment = {
            **os.environ,
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_TEMP_DIR": scratch,
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(folder / "app.py"), "--port", str(port), *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=scratch)
        try:
            url = f"http://127.0.0.1:{port}/"
            _wait_until_served(url, server, Path(scratch) / "log")
            yield url
        finally:
            server.kill()  # it has nothing to save
            server.wait()


def _wait_until_served(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"The demo does not answer: {log.read_text()}")


@contextmanager
def chromium(camera: Path | None = None) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile that makes no network requests of its own.

    Args:
        camera: MJPEG video that the camera plays in a loop; None: Chromium's moving test picture.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for argument in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            # A fake camera, and no question whether it may be used.
            "--use-fake-device-for-media-stream",
            "--use-fake-ui-for-media-stream",
            "--window-size=1200,900",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        if camera is not None:
            options.add_argument(f"--use-file-for-fake-video-capture={camera}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def set_screen(driver: webdriver.Chrome, width: int, height: int, mobile: bool = False) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
