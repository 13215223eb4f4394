"""The report in a real browser: headless Chromium, driven over the WebDriver protocol. Skipped where there is none."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import made_up
import numpy as np
import pytest
from PIL import Image

from figures.paper import report
from figures.paper.artifacts import build
from figures.paper.claims import judge

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what WebDriver calls a reference to an element
KEYS = {"right": "\ue014", "down": "\ue015", "tab": "\ue004"}


@pytest.fixture(scope="module")
def tables():
    return made_up.make()


@pytest.fixture(scope="module")
def page(tables, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report.write(tables, build(tables), judge(tables), path)


class Browser:
    """As much of a WebDriver client as is needed here."""

    def __init__(self, port: int):
        self.at = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
        capabilities = {"goog:chromeOptions": {"args": arguments, "binary": CHROMIUM}}
        capabilities["goog:loggingPrefs"] = {"browser": "ALL"}
        found = self("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self.at += f"/{found['sessionId']}"

    def __call__(self, verb: str, path: str, content: dict | None = None):
        data = json.dumps(content).encode() if content is not None else None
        request = urllib.request.Request(self.at + path, data, {"Content-Type": "application/json"}, method=verb)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self("POST", "/url", {"url": "about:blank"})  # a change of the hash alone would not load the page anew
        self("POST", "/url", {"url": url})
        until = time.monotonic() + 60
        while self.js("return document.body.dataset.ready") != "true":
            assert time.monotonic() < until, self("POST", "/se/log", {"type": "browser"})
            time.sleep(0.05)

    def js(self, script: str, *words):
        return self("POST", "/execute/sync", {"script": script, "args": list(words)})

    def find(self, selector: str) -> str:
        return self("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def press(self, selector: str, *keys: str) -> None:
        self("POST", f"/element/{self.find(selector)}/value", {"text": "".join(KEYS.get(key, key) for key in keys)})

    def point(self, selector: str, right: float, down: float) -> None:
        """Move the mouse to a place in an element, in shares of its size from its middle."""
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        box = self.js("const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.width, b.height]",
                      selector)  # fmt: skip
        place = {"type": "pointerMove", "duration": 0, "origin": {ELEMENT: self.find(selector)},
                 "x": round(right * box[0]), "y": round(down * box[1])}  # fmt: skip
        self("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [place]}]})

    def number(self, side: int, field: str) -> float:
        return float(self.js("return document.querySelectorAll('.side')[arguments[0]].querySelector('.' + arguments[1])"
                             ".textContent", side, field))  # fmt: skip

    def query(self) -> int:
        return int(re.search(r"query=(\d+)", self.js("return location.hash"))[1])


@pytest.fixture(scope="module")
def browser():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                found = Browser(port)
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < until
                time.sleep(0.1)
        yield found
        found("DELETE", "")
    finally:
        process.kill()
        process.wait()


def test_one_file_without_network(page):
    text = page.read_text()
    assert page.stat().st_size < report.MOST_BYTES
    assert not re.search(r"(src|href|action)=[\"'](?!data:|#)", text), "everything is in the file"
    assert not re.search(r"https?://|@import|fetch\(|XMLHttpRequest", text)
    assert not re.search(r"<!--\w+-->", text), "every part of the template is filled"


def test_it_says_what_the_tables_say(page, tables):
    text, judged = page.read_text(), judge(tables)
    for row in judged[judged["part"] == ""].itertuples():
        mark = {"holds": "yes", "does not hold": "no"}.get(row.verdict, "open")
        assert f'<th scope="row">{row.claim}</th>' in text and f'<td class="{mark}">{row.verdict}</td>' in text
    distance = made_up.np.mean([made_up.d_loc(False, seed, 3, 2, head, image) for seed in range(3)
                                for head in range(2) for image in range(made_up.IMAGES)])  # fmt: skip
    block = text.split('<p class="caption">baseline, CIL: D_loc in patches')[1].split("</table>")[0]
    assert f"{distance:.3f}" in block.split("task 4")[1]
    for run in tables["runs.csv"]["run"]:
        assert f'<th scope="row">{run}</th>' in text


@pytest.mark.slow
def test_names_are_escaped(tables):
    runs = tables["runs.csv"].assign(torch="<script>alert(1)</script>")
    text = report.render(tables | {"runs.csv": runs}, build(tables), judge(tables))
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


@pytest.mark.slow
def test_without_attention_the_rest_is_there(tables):
    less = tables | {"attention.parquet": tables["attention.parquet"].iloc[:0]}
    text = report.render(less, build(less), judge(less))
    assert "Figure 2: locality degradation" in text and "not run (no attention over the examples)" in text
    assert '<script type="application/json" id="data">{}</script>' in text


@in_chromium
def test_the_viewer_shows_the_numbers_of_the_table(browser, page, tables):
    rows = tables["nonlocality.parquet"]
    maps = tables["attention.parquet"]
    for task, layer, head, query in ((0, 0, "mean", 0), (3, 2, "mean", 1), (2, 1, 1, 3)):
        browser.open(f"file://{page}#image=0&layer={layer}&head={head}&task={task}&query={query}")
        titles = browser.js("return [...document.querySelectorAll('.side h3')].map((h) => h.textContent)")
        assert titles == ["CIL", "joint", "CIL with LPA"]
        for side, run in enumerate(("demo-baseline-s0", "demo-baseline-s0-joint", "demo-baseline-lpa-s0")):
            place = (rows["run"] == run) & (rows["task"] == task) & (rows["layer"] == layer)
            here = (maps["run"] == run) & (maps["task"] == task) & (maps["layer"] == layer)
            if head != "mean":
                place, here = place & (rows["head"] == head), here & (maps["head"] == head)
            assert browser.number(side, "table") == pytest.approx(rows.loc[place, "d_loc"].mean(), abs=5.1e-4)
            assert browser.number(side, "image") == pytest.approx(maps.loc[here, "distance"].mean(), abs=5.1e-4)
            of_query = maps[here & (maps["query"] == query)]
            assert browser.number(side, "patch") == pytest.approx(of_query["distance"].mean(), abs=5.1e-4)
            weights = [
                np.frombuffer(w, np.uint8) / 255 * p for w, p in zip(of_query["weights"], of_query["peak"], strict=True)
            ]
            assert browser.number(side, "itself") == pytest.approx(np.mean(weights, 0)[query], abs=5.1e-4)


@in_chromium
def test_pointing_arrow_keys_and_the_slider_move_what_is_shown(browser, page):
    browser.open(f"file://{page}#task=0&query=0")
    browser.point(".side:nth-child(2) canvas", 0.25, 0.25)  # row 2, column 2 of a grid of 2 x 2
    assert browser.query() == 3 and browser.number(0, "patch") == pytest.approx(0.43, abs=1e-3)
    browser.point(".side:nth-child(2) canvas", -0.25, 0.25)
    assert browser.query() == 2
    browser.press(".side canvas", "right")
    assert browser.query() == 3
    browser.press(".side canvas", "down")  # at the border
    assert browser.query() == 3
    browser.press(".side canvas", "+")
    assert "task=1" in browser.js("return location.hash") and browser.number(0, "patch") == pytest.approx(
        0.53, abs=1e-3
    )
    browser.press("#task", "right", "right")
    assert "task=3" in browser.js("return location.hash") and browser.number(2, "patch") == pytest.approx(
        0.73, abs=1e-3
    )


@in_chromium
def test_what_a_link_cannot_mean_is_left_out(browser, page):
    browser.open(f"file://{page}#image=9&layer=-1&head=7&task=99&query=abc&other=1")
    assert browser.js("return location.hash") == "#image=0&layer=2&head=mean&task=3&query=3"


@in_chromium
def test_everything_is_reached_with_the_keyboard(browser, page):
    browser.open(f"file://{page}")
    reached = browser.js("""return [...document.querySelectorAll('#viewer select, #viewer input, #viewer canvas')]
        .every((e) => { e.focus(); return document.activeElement === e; })""")
    assert reached
    named = browser.js(
        """return [...document.querySelectorAll('#viewer select, #viewer input')].every((e) => e.labels.length)"""
    )
    assert named and browser.js("return [...document.querySelectorAll('canvas')].every((c) => c.ariaLabel)")


@in_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_its_window(browser, page, width):
    browser("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": {
        "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}})  # fmt: skip
    browser.open(f"file://{page}")
    assert browser.js("return document.documentElement.scrollWidth") <= width
    columns = browser.js("return new Set([...document.querySelectorAll('.side')].map((s) => s.offsetLeft)).size")
    assert columns == (1 if width < 500 else 3)


@in_chromium
def test_dark_and_light(browser, page):
    seen = {}
    for scheme in ("light", "dark"):
        browser("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]}})  # fmt: skip
        browser.open(f"file://{page}")
        picture = Image.open(io.BytesIO(base64.b64decode(browser("GET", "/screenshot"))))
        seen[scheme] = np.median(np.asarray(picture.convert("L")))
    assert seen["light"] > 220 and seen["dark"] < 50


@in_chromium
def test_nothing_is_complained_about(browser, page):
    browser.open(f"file://{page}")
    assert not [line for line in browser("POST", "/se/log", {"type": "browser"}) if line["level"] == "SEVERE"]
