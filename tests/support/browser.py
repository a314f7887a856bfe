"""A headless Chromium over its DevTools protocol: what a page looks like, says, asks for and lays out.

The protocol is JSON over two pipes that the browser finds as its file descriptors 3 and 4: nothing beside Python is
needed, and no port is opened.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--no-default-browser-check", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe"),
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_SECONDS = 120.0
# What is wider than the page, and is not inside something that scrolls by itself.
_OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const box = element.getBoundingClientRect();
    if (box.width > 0 && (box.right > width + 1 || box.left < -1) && !element.closest('.scroll, pre')) {
      found.push(element.tagName + ' ' + Math.round(box.left) + ' to ' + Math.round(box.right) + ' of ' + width);
    }
  }
  if (document.documentElement.scrollWidth > width) found.push('page ' + document.documentElement.scrollWidth);
  return found;
})()
"""
_IMAGES = """
[...document.images].map(image => ({
  complete: image.complete, width: image.naturalWidth, height: image.naturalHeight, alt: image.alt,
  shown: image.getBoundingClientRect().width
}))
"""


def chromium() -> str | None:
    """The browser's path, or None where it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Loaded:
    """What came of loading a page."""

    title: str = ""  # of the document
    text: str = ""  # what a reader sees
    complaints: list[str] = field(default_factory=list)  # console messages above info, exceptions and log entries
    # Everything that was asked for beside the page itself and data: URLs.
    requests: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)  # size and state of every image
    overflowing: list[str] = field(default_factory=list)  # elements that reach beyond the viewport
    screenshot: bytes = b""  # the whole page as PNG


class Browser:
    """A running browser with a profile of its own; a context manager."""

    def __init__(self, profile: Path) -> None:
        path = chromium()
        assert path is not None
        self._buffer, self._number = b"", 0
        self._events: list[dict[str, Any]] = []
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        # Descriptors 3 and 4 are only free in a shell that nothing else was handed to.
        command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", path, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The session is the browser's own: all of its processes, and no others, are in its group.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)

    def load(self, page: Path, width: int = 1280, height: int = 900) -> Loaded:
        """Loads a file in a new tab of this size and looks at everything."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", session, **size)
        self._events.clear()
        self._call("Page.navigate", session, url=page.resolve().as_uri())
        self._wait_for("Page.loadEventFired")
        loaded = Loaded(
            title=self._evaluate("document.title", session),
            text=self._evaluate("document.body.innerText", session),
            images=self._evaluate(_IMAGES, session),
            overflowing=self._evaluate(_OVERFLOW, session),
        )
        shot = self._call("Page.captureScreenshot", session, format="png", captureBeyondViewport=True)
        loaded.screenshot = base64.b64decode(shot["data"])
        self._sort_events(loaded, page.resolve().as_uri())
        self._call("Target.closeTarget", targetId=target)
        return loaded

    def _sort_events(self, loaded: Loaded, own: str) -> None:
        for event in self._events:
            values = event["params"]
            if event["method"] == "Log.entryAdded":
                loaded.complaints.append(values["entry"]["text"])
            elif event["method"] == "Runtime.exceptionThrown":
                loaded.complaints.append(str(values["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
                loaded.complaints.append(str(values["args"]))
            elif event["method"] == "Network.requestWillBeSent":
                url = values["request"]["url"]
                loaded.requests += [] if url == own or url.startswith("data:") else [url]

    def _evaluate(self, expression: str, session: str) -> Any:
        answer = self._call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], _PATIENCE_SECONDS)
            assert ready, "the browser does not answer"
            read = os.read(self._from, 1 << 20)
            assert read, "the browser has ended"
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer
