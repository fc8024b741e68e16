"""Chromium without a window, driven over its debugging pipe: keys, clicks, pictures of a page."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 60  # seconds
CODES = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35}
CODES |= {"PageUp": 33, "PageDown": 34, "Tab": 9, "Enter": 13, " ": 32}


class Page:
    """A tab. ``events`` are those that came since it was opened, as the browser names them."""

    def __init__(self, write: int, read: int):
        self._write, self._read, self._buffer = write, read, b""
        self._number, self._session, self.events = 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        opened = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = opened["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], PATIENCE)[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE} s")
            data = os.read(self._read, 1 << 16)
            if not data:
                raise RuntimeError("the browser ended")
            self._buffer += data
        first, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(first)
        if "id" not in message:
            self.events.append(message)
        return message

    def look(self, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        """Set the size of the window in CSS pixels, and what its user prefers."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, file: Path, fragment: str = "") -> None:
        self.events.clear()
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=file.absolute().as_uri() + fragment)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()
        while self.do("location.href") == "about:blank" or not self.do(
            "document.readyState === 'complete'"
        ):
            pass

    def do(self, script: str):
        """Return what a JavaScript expression is, waited for if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        code = dict(key=key, code=key.replace(" ", "Space"), windowsVirtualKeyCode=CODES[key])
        text = {" ": " ", "Enter": "\r"}.get(key)
        kind = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, **code, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def click(self, selector: str, across: float = 0.5) -> None:
        """Click an element, ``across`` of its width from its left side."""
        at = dict(**self._place(selector, across), button="left", clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mousePressed", buttons=1, **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def tap(self, selector: str, across: float = 0.5) -> None:
        """Touch an element with a finger."""
        points = [self._place(selector, across)]
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _place(self, selector: str, across: float) -> dict:
        x, y, width, height = self.do(
            f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector("
            f"{json.dumps(selector)}).getBoundingClientRect())"
        )
        return {"x": x + across * width, "y": y + height / 2}

    def picture(self, file: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """Start the browser with ``folder`` for its profile; end it after the block."""
    down, up = os.pipe(), os.pipe()
    # 3 and 4 are the numbers that the browser reads and writes; ours must be others
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (down[0], up[1])]
    ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (down[1], up[0])]
    for fd in (*down, *up):
        os.close(fd)

    def connect() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
    process = subprocess.Popen(
        [PROGRAM, *options],
        preexec_fn=connect,
        pass_fds=(3, 4),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for fd in theirs:
        os.close(fd)
    try:
        yield Page(*ours)
    finally:
        for fd in ours:
            os.close(fd)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
