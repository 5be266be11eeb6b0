"""Headless Chromium, driven over its own pipe (the DevTools protocol), without a driver of another project."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
          "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")  # fmt: skip
# The protocol's descriptors are 3 and 4; copies of the pipes first, where one of them has the other's number.
_START = """import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Page:
    """A page of a browser. requests: addresses that it asked for.

    errors: what it wrote to its console as errors, and exceptions of its script.
    """

    def __init__(self, to_browser: Any, from_browser: Any) -> None:
        self._out, self._in, self._number = to_browser, from_browser, 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        return self._call(method, parameters, self._session)

    def open(self, url: str) -> None:
        """Goes to an address and waits until all of it is there."""
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            message = json.loads(self._message())
            self._hear(message.get("method"), message.get("params"))

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, secs: float = 30.0) -> None:
        """Waits until an expression is true."""
        assert self.run(f"""(async () => {{
            const end = Date.now() + {secs * 1000};
            while (!({condition}) && Date.now() < end) await new Promise(done => setTimeout(done, 20));
            return Boolean({condition});
        }})()"""), condition

    def screen(self, path: Path) -> None:
        """Saves what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, parameters: dict[str, Any], session: str | None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._hear(answer.get("method"), answer.get("params"))

    def _message(self) -> bytes:
        found = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser has ended"
            found += byte
        return bytes(found)

    def _hear(self, method: str | None, event: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] == "error":
            self.errors.append(json.dumps(event["args"]))


@contextlib.contextmanager
def page(width: int, height: int) -> Iterator[Page]:
    """A page of a browser of its own, of a size in pixels."""
    here_reads, browser_writes = os.pipe()
    browser_reads, here_writes = os.pipe()

    # Processes of the browser may write for a moment after it was killed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        pipe = (str(browser_reads), str(browser_writes))
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *pipe, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(browser_reads, browser_writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(browser_reads)
        os.close(browser_writes)
        try:
            with open(here_writes, "wb") as out, open(here_reads, "rb") as replies:
                one = Page(out, replies)
                one.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                         mobile=width < 500)  # fmt: skip
                yield one
        finally:
            process.kill()
            process.wait()
