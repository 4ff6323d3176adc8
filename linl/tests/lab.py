"""JupyterLab in a real browser: a notebook opened, run, its sliders moved, and everything looked at, as a reader would.

Wants Chromium (Debian: `apt install chromium`; Chrome does as well) and the extra `browser`, which `make browser`
installs. Playwright drives the browser that is there; none of its own is downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

try:
    from playwright.sync_api import Locator, Page, sync_playwright
except ModuleNotFoundError:
    sync_playwright = None

BROWSERS = "chromium", "chromium-browser", "google-chrome"
SECONDS = 900
"""At most that long for a notebook from top to bottom; the longest takes a minute or two on a core of its own."""
QUIET = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
"""Settings of JupyterLab: all as it comes, but for the question about news, which lies over the notebook."""


def missing() -> str:
    """What must be installed first, in a sentence; empty if everything is there."""
    if not _browser():
        return "the notebooks can't be looked at without Chromium: apt install chromium"
    return "" if sync_playwright else "the notebooks can't be looked at without Playwright: make browser installs it"


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@dataclass
class Lab:
    """A running JupyterLab and a browser beside it."""

    address: str  # with a place for the notebook's path
    browser: Any
    log: Path

    @contextlib.contextmanager
    def open(self, path: str, shots: Path) -> Iterator[Notebook]:
        """A notebook in a window of its own; its kernel goes when it is closed.

        Args:
            path: below the lab's root.
            shots: a folder for screenshots, emptied of older ones.
        """
        shots.mkdir(parents=True, exist_ok=True)
        for old in shots.glob("*.png"):
            old.unlink()
        page = self.browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(120_000)
        try:
            page.goto(self.address.format(path))
            page.locator(".jp-Notebook .jp-Cell").first.wait_for()
            notebook = Notebook(page, shots)
            notebook.wait("the kernel doesn't start", lambda: notebook.state()["kernel"] == "idle", 120)
            yield notebook
            page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        except Exception as error:
            with contextlib.suppress(Exception):
                page.screenshot(path=shots / "failed.png")
            error.add_note(f"screenshots: {shots}\nthe end of JupyterLab's log:\n{_end(self.log)}")
            raise
        finally:
            page.close()


@contextlib.contextmanager
def jupyterlab(root: Path, folder: Path) -> Iterator[Lab]:
    """JupyterLab on a free port of this machine, stopped with all its kernels in the end, and a browser.

    Args:
        root: what it shows; notebooks that are saved are saved there.
        folder: empty, for settings, logs and results.
    """
    for name, settings in QUIET.items():
        file = folder / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    own |= {"IPYTHONDIR": "ipython", "LINL_RESULTS": "results"}
    token, port = secrets.token_hex(), _free_port()
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": root,
        "IdentityProvider.token": token, "LabApp.expose_app_in_browser": True, "ServerApp.allow_root": True,
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
    env = {**os.environ, **{name: str(folder / place) for name, place in own.items()}}
    log, base = folder / "jupyterlab.log", f"http://127.0.0.1:{port}"
    with open(log, "w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait_for(f"{base}/api/status?token={token}", server, log)
        with sync_playwright() as playwright:
            sandbox = [] if os.geteuid() else ["--no-sandbox"]  # root has none
            browser = playwright.chromium.launch(executable_path=_browser(), args=sandbox)
            try:
                yield Lab(f"{base}/lab/tree/{{}}?token={token}&reset", browser, log)
            finally:
                browser.close()
    finally:
        _stop(server)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab doesn't start; the end of its log:\n{_end(log)}")


def _stop(server: subprocess.Popen) -> None:
    """Ends the server, and whatever of its kernels and helpers (they lead process groups of their own) outlives it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        kernels = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        for process in kernels:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


def _end(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


STATE = """() => {
  const widget = jupyterapp.shell.currentWidget, cells = [...widget.content.model.cells].filter(c => c.type === 'code');
  const outputs = cells.flatMap(c => c.outputs.toJSON());
  return {
    kernel: widget.sessionContext.session?.kernel?.status,
    running: cells.filter(c => c.executionState !== 'idle').length,
    begun: cells.filter(c => c.executionCount !== null).length,
    left: cells.filter(c => c.executionCount === null && c.sharedModel.getSource().trim()).length,
    pictures: outputs.filter(o => o.data && ('image/png' in o.data || 'image/svg+xml' in o.data)).length,
  };
}"""
PICTURE = """async picture => {
  await picture.decode().catch(() => null);
  if (!picture.naturalWidth) return "isn't loaded";
  const side = 96, canvas = new OffscreenCanvas(side, side).getContext('2d');
  canvas.drawImage(picture, 0, 0, side, side);
  const colors = new Set(new Uint32Array(canvas.getImageData(0, 0, side, side).data.buffer));
  if (colors.size < 2) return 'is empty';
  const box = picture.getBoundingClientRect(), around = picture.closest('.jp-Cell-outputArea').getBoundingClientRect();
  if (box.width < 20 || box.height < 20) return "isn't shown";
  return box.right > around.right + 1 ? 'is cut off' : '';
}"""
WIDE = "areas => areas.filter(a => a.scrollWidth > a.clientWidth + 1).map(a => a.textContent.trim().slice(0, 60))"
NEXT = """panel => {
  const cells = panel.querySelectorAll('.jp-Cell'), end = cells[cells.length - 1].getBoundingClientRect().bottom;
  const before = panel.scrollTop, over = end <= panel.getBoundingClientRect().bottom;
  panel.scrollBy(0, panel.clientHeight - 60);
  return over || panel.scrollTop === before;
}"""
MESSAGES = "application/vnd.jupyter.error", "application/vnd.jupyter.stderr"
FORMULAS = "mjx-merror"
IN_WIDGETS = ".jp-Notebook .jupyter-widgets .jp-OutputArea-output img, .jp-Notebook img.jupyter-widgets"
"""Pictures that no cell's output holds: in an Output widget, or `linl.sliders.picture`'s."""


@dataclass
class Notebook:
    """One that is open in the browser."""

    page: Page
    shots: Path

    def state(self) -> dict[str, Any]:
        """Of the kernel and the cells, from JupyterLab's own model."""
        return self.page.evaluate(STATE)

    def wait(self, otherwise: str, true: Callable[[], bool], seconds: float) -> None:
        """Until something is true.

        Raises:
            TimeoutError: it isn't, after so many seconds.
        """
        until = time.monotonic() + seconds
        while not true():
            if time.monotonic() > until:
                raise TimeoutError(f"{otherwise}: {seconds} s waited")
            self.page.wait_for_timeout(100)

    def run(self) -> None:
        """Every cell, by the menu; returns when the kernel is idle again, whether or not it came to the end."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        self.wait("the notebook doesn't come to an end", self._over, SECONDS)

    def _over(self) -> bool:
        now = self.state()
        return now["kernel"] == "idle" and not now["running"] and now["begun"] > 0

    def sliders(self) -> list[Locator]:
        return self.page.locator(".jp-Notebook .noUi-handle").all()

    def pictures(self, within: Locator | None = None) -> Locator:
        return (within or self.page.locator(".jp-Notebook")).locator(".jp-OutputArea-output img")

    def move(self, slider: Locator, seconds: float = 60) -> str:
        """Moves a slider by the keyboard; what is wrong with it, nothing if its cell's picture has changed."""
        slider.scroll_into_view_if_needed()
        cell = slider.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-CodeCell ')]")
        sources = lambda: [picture.get_attribute("src") for picture in self.pictures(cell).all()]  # noqa: E731
        control = slider.locator("xpath=ancestor::*[contains(@class, 'widget-slider')]")
        name, before, value = control.locator(".widget-label").inner_text(), sources(), self._value(slider)
        at_end = float(slider.get_attribute("aria-valuenow")) >= float(slider.get_attribute("aria-valuemax"))
        slider.focus()
        for _ in range(3):
            self.page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
        try:
            self.wait("", lambda: self._value(slider) != value, 10)
            self.wait("", lambda: len(sources()) > 0 and sources() != before, seconds)
            self.wait("", lambda: self.state()["kernel"] == "idle" and len(sources()) == len(before), seconds)
        except TimeoutError:
            return f"slider {name!r} went from {value} to {self._value(slider)}, and the picture is the same"
        return ""

    def _value(self, slider: Locator) -> str:
        return slider.get_attribute("aria-valuetext")

    def faults(self) -> list[str]:
        """What a reader would stumble over, in words: errors, cells without a result, pictures that don't show."""
        found, now = [], self.state()
        for kind in MESSAGES:
            texts = self.page.locator(f'.jp-Notebook [data-mime-type="{kind}"]').all_inner_texts()
            found += [f"{kind.rpartition('.')[2]}: {text.strip()[-400:]}" for text in texts]
        if now["left"]:
            found.append(f"{now['left']} cells were not run")
        shown = self.pictures().all()
        in_widgets = self.page.locator(IN_WIDGETS).count()
        if len(shown) - in_widgets != now["pictures"]:
            found.append(f"{len(shown) - in_widgets} pictures are shown, the notebook holds {now['pictures']}")
        for number, picture in enumerate(shown, 1):
            picture.scroll_into_view_if_needed()
            if wrong := picture.evaluate(PICTURE):
                found.append(f"picture {number} {wrong}")
        found += [f"formula: {text}" for text in self.page.locator(FORMULAS).all_inner_texts()]
        wide = self.page.locator(".jp-Notebook .jp-OutputArea-output").evaluate_all(WIDE)
        return found + [f"too wide for its cell: {text}" for text in wide]

    def photograph(self) -> int:
        """Screenshots of the whole notebook, page by page; returns how many."""
        panel = self.page.locator(".jp-NotebookPanel .jp-WindowedPanel-outer")
        panel.evaluate("panel => panel.scrollTo(0, 0)")
        for number in range(1, 100):
            self.page.wait_for_timeout(300)
            panel.screenshot(path=self.shots / f"{number:02d}.png")
            if panel.evaluate(NEXT):
                break
        return number


if __name__ == "__main__":
    sys.exit(missing() or None)
