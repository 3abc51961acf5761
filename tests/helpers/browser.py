"""Opens a page in headless Chromium at a width, light and dark, and says what is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: pages are not opened in a browser")

# Runs inside the page. A chart has marks if its picture changes when its renderers are hidden; its text is cut off if
# its picture has ink at an edge.
_CHECK = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => errors.push(words.join(" "));
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const pixels = (view) => {
  const canvas = view.export("auto", false).canvas;
  const [w, h] = [canvas.width, canvas.height];
  return { w, h, data: canvas.getContext("2d").getImageData(0, 0, w, h).data };
};
function edge({ data, w, h }) {
  let ink = 0;
  for (let y = 0; y < h; y++) for (const x of [0, w - 1]) ink += data[4 * (y * w + x) + 3] > 0;
  return ink;
}
async function charts() {
  const found = {};
  for (const [key, view] of Object.entries(fedqReport.views)) {
    const box = document.getElementById(key);
    if (!box.getClientRects().length) continue; // of a run without this histogram
    const before = pixels(view);
    for (const renderer of view.model.renderers) renderer.visible = false;
    await pause(50); // drawn in the next frame
    const after = pixels(view);
    for (const renderer of view.model.renderers) renderer.visible = true;
    let marks = 0;
    for (let i = 0; i < before.data.length; i += 4)
      marks += [0, 1, 2, 3].some((c) => before.data[i + c] !== after.data[i + c]);
    const axis = [...view.model.document.all_models].find((model) => /Axis$/.test(model.type));
    found[key] = { marks, edge: edge(before), width: before.w, text: axis.major_label_text_color };
  }
  return found;
}
const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
function cutOff() {
  const bad = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (!element.getClientRects().length || element.closest("script, style, .plot")) continue;
    const words = element.textContent.slice(0, 40);
    const name = `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""} ${words}`;
    let inside = false;
    for (let up = element; up !== document.body; up = up.parentElement) inside ||= scrolls(up);
    const box = element.getBoundingClientRect();
    if (!inside && (box.right > innerWidth + 1 || box.left < -1)) bad.push(`beyond the page: ${name}`);
    const isSvg = element instanceof SVGElement;
    if (!isSvg && !scrolls(element) && getComputedStyle(element).display !== "inline" && element.tagName !== "SELECT")
      if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth && !inside) bad.push(`cut off: ${name}`);
    if (element.tagName === "text") {
      const frame = element.ownerSVGElement.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1) bad.push(`out of the drawing: ${name}`);
    }
  }
  return bad;
}
const colours = () => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
addEventListener("load", async () => {
  const result = { errors };
  try {
    while (!document.documentElement.dataset.drawn) await pause(50);
    await pause(300);
    const scroll = () => document.documentElement.scrollWidth;
    const theme = async () => ({ charts: await charts(), cut: cutOff(), colours: colours(), scroll: scroll() });
    result.first = await theme();
    document.getElementById("theme").click();
    await pause(100);
    result.second = await theme();
    ACTIONS
  } catch (error) { errors.push(`check: ${error.stack}`); }
  result.width = innerWidth;
  parent.postMessage(JSON.stringify(result), "*");
});
</script>
"""

_FRAME = """<!doctype html><body style="margin:0">
<iframe src="page.html" style="width:{width}px;height:{height}px;border:0"></iframe><pre id="result"></pre>
<script>addEventListener("message", (event) => document.getElementById("result").textContent = event.data);</script>
"""


def look_at(page: Path, width: int, *, dark: bool = False, actions: str = "") -> dict[str, Any]:
    """Return what the page shows at a width, before and after its theme is changed.

    A frame in a larger window: Chromium's own window is never narrower than 500 pixels.

    Args:
        page: An HTML file.
        width: Of the frame.
        dark: Whether the system prefers dark pages.
        actions: JavaScript that goes on after the check and may add to `result`.

    Returns:
        `errors` (console and uncaught), `first` and `second` theme (`charts` by key with `marks`, pixels that they
        draw; `edge`, ink at the sides; `cut`, elements whose text is cut off; `scroll`, the page's width), `width`.
    """
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder:
        text = page.read_text(encoding="utf-8").replace("<head>", "<head>" + _CHECK.replace("ACTIONS", actions), 1)
        (Path(folder) / "page.html").write_text(text, encoding="utf-8")
        (Path(folder) / "frame.html").write_text(_FRAME.format(width=width, height=900), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--mute-audio"]
        options += ["--disable-dev-shm-usage", "--window-size=1400,1000", "--virtual-time-budget=60000", "--dump-dom"]
        options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        command = [CHROMIUM, *options, f"file://{folder}/frame.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    assert found[1], f"the page did not answer: {done.stderr[-2000:]}"
    return json.loads(unescape(found[1]))
