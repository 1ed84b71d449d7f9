"""A headless Chromium, spoken to through a pipe: no driver, no port, no package."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE = 60.0
"""Seconds for an answer; a laden machine needs many to start it."""
# Chromium reads commands from 3 and answers on 4, which may be anything here: both ends go beyond them first.
HAND_OVER = (
    "import os, sys; from fcntl import F_DUPFD, fcntl;"
    "read, write = (fcntl(int(end), F_DUPFD, 5) for end in sys.argv[1:3]);"
    "os.dup2(read, 3); os.dup2(write, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-extensions", "--remote-debugging-pipe"),
)


class Browser:
    """One page of one browser.

    Attributes:
        requests: addresses that the last page asked for, itself and `data:` left out.
        complaints: what it wrote to the console, errors and refusals of its policy included.
    """

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium")
        assert program is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [sys.executable, "-c", HAND_OVER, str(theirs_in), str(theirs_out)]
        self._process = subprocess.Popen(
            [*command, program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._left = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._url = ""
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(timeout=10)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._in)
            os.close(self._out)

    def open(self, file: Path, width: int = 1280, scheme: str = "light") -> None:
        """Load a file in a window of that width, for eyes that prefer that scheme."""
        self.requests, self.complaints = [], []
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._url = file.resolve().as_uri()
        self.call("Page.navigate", url=self._url)
        self._receive(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression, or of a function's body, in the page; its errors fail."""
        body = script if script.lstrip().startswith("return") or ";" in script else f"return {script}"
        answer = self.call("Runtime.evaluate", expression=f"(() => {{ {body} }})()", returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._receive(lambda message: message.get("id") == number)
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self._left:
                ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, "Chromium does not answer"
                read = os.read(self._in, 1 << 20)
                assert read, "Chromium has died"
                self._left += read
            text, _, self._left = self._left.partition(b"\0")
            message: dict[str, Any] = json.loads(text)
            self._note(message)
            if is_wanted(message):
                return message

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if url != self._url and not url.startswith("data:"):
                self.requests.append(url)
        elif method == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(parameters))
