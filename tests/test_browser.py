"""Two chapters in a real browser: JupyterLab on loopback, headless Chromium, a slider moved with the keyboard."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from dora_lab.profiles import PROJECT

pytestmark = pytest.mark.slow

CHAPTERS = {"01_low_rank_updates": "rank r", "05_tasks_and_prompts": "difference (points)"}  # with a slider's label
STARTED = "return [...document.querySelectorAll('.jp-InputPrompt')].some(p => /[*0-9]/.test(p.textContent))"
BUSY = "return [...document.querySelectorAll('.jp-InputPrompt')].filter(p => p.textContent.includes('*')).length"


@pytest.fixture(scope="module")
def driver():
    """Headless Chromium, driven by selenium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    service = shutil.which("chromedriver")
    if not browser or not service:
        pytest.skip("no Chromium with chromedriver is installed (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1200"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(service))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab over a copy of the notebooks; gives (address, token)."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(PROJECT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--allow-root"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # nothing asks the network
    places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME")}
    environment = os.environ | places | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=PROJECT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                break
            assert server.poll() is None, (folder / "lab.log").read_text()
            time.sleep(0.5)
        yield address, token
    finally:
        server.terminate()
        server.wait(timeout=30)


def kernel_is_ready(lab, chapter):
    """Whether the chapter's kernel is idle and the page is connected to it, as the server sees it."""
    address, token = lab
    with urllib.request.urlopen(f"{address}/api/sessions?token={token}", timeout=10) as answer:
        kernels = [session["kernel"] for session in json.load(answer) if chapter in session["path"]]
    return any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_slider_moved_with_the_keyboard_changes_the_figure(chapter, lab, driver, tmp_path):
    from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(condition, seconds, what):
        try:
            return WebDriverWait(driver, seconds, 0.5, [StaleElementReferenceException]).until(condition)
        except TimeoutException:
            driver.save_screenshot(str(tmp_path / "failed.png"))
            raise AssertionError(f"{chapter}: {what}; see {tmp_path / 'failed.png'}") from None

    address, token = lab
    driver.get(f"{address}/lab/tree/notebooks/{chapter}.ipynb?token={token}&reset")
    wait(lambda d: d.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell"), 120, "the notebook did not open")
    wait(lambda d: kernel_is_ready(lab, chapter), 120, "the kernel did not start")
    run_all = "//*[contains(@class, 'lm-Menu-itemLabel') and starts-with(text(), 'Run All Cells')]"
    for _ in range(6):  # the page may learn of its kernel a little later; asked too early, it runs nothing
        time.sleep(3)
        if driver.execute_script(STARTED):
            break
        for _ in driver.find_elements(By.CSS_SELECTOR, ".jp-Dialog"):  # or asks which kernel it should take
            driver.switch_to.active_element.send_keys(Keys.ESCAPE)
            time.sleep(1)
        driver.find_element(By.XPATH, "//*[contains(@class, 'lm-MenuBar-itemLabel') and text()='Run']").click()
        wait(lambda d: d.find_elements(By.XPATH, run_all), 20, "no menu entry Run All Cells")[0].click()
    label = CHAPTERS[chapter]
    handle = f"//div[contains(@class, 'widget-slider')][label[text()='{label}']]//*[contains(@class, 'noUi-handle')]"
    # Lab keeps cells out of the page until they are near the view: look for the panel from top to bottom
    scroll = "const w = document.querySelector('.jp-WindowedPanel-outer'); w.scrollBy(0, 500);"
    scroll += "if (w.scrollTop + w.clientHeight > w.scrollHeight - 5) w.scrollTo(0, 0);"

    def search(driver):
        driver.execute_script(scroll)
        time.sleep(0.2)
        return driver.find_elements(By.XPATH, handle)

    slider = wait(search, 180, f"no slider {label!r}")[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    panel = slider.find_element(By.XPATH, "ancestor::*[contains(@class, 'widget-vbox')][1]")
    wait(lambda d: panel.find_elements(By.CSS_SELECTOR, "img[alt]"), 60, "the panel has no figure")

    def picture():
        image = panel.find_element(By.CSS_SELECTOR, "img[alt]")  # stale as soon as the next picture comes
        return image.get_attribute("src"), image.get_attribute("alt")

    wait(lambda d: not d.execute_script(BUSY), 240, "cells were still running")
    before = picture()
    assert before[0].startswith("data:image/png;base64,") and len(before[1]) > 60
    driver.execute_script("arguments[0].focus()", slider)
    for _ in range(5):
        driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    wait(lambda d: picture()[0] != before[0] and picture()[1] != before[1], 60, "the figure did not change")
    assert slider.get_attribute("aria-valuenow") != slider.get_attribute("aria-valuemin")
    broken = driver.execute_script("return [...document.images].filter(i => i.complete && !i.naturalWidth).length")
    assert broken == 0
    driver.save_screenshot(str(tmp_path / f"{chapter}.png"))
