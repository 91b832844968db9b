"""Chromium without a window, led over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/).

Law: what was started is ended, by its process id. A page's errors and requests are kept, for tests to look at.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
_START_S = 30


def chromium() -> str | None:
    """Where it is: ``CHROMIUM`` in the environment says, else it is looked for on the path."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """A tab.

    Attributes:
        errors: what the console was told, exceptions that nobody caught, and what the page's policy refused.
        requests: URLs that were asked for, the page's own among them.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._socket = socket
        self._sent = 0
        self._events: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its result."""
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": params})
        while (message := await self._receive()).get("id") != self._sent:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    async def open(self, url: str, *, width: int = 1200, height: int = 900, is_dark: bool = False) -> None:
        """Loads a page in a window of that size, and returns when it is drawn."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            await self._receive()
        await self.drawn()

    async def resize(self, width: int, height: int) -> None:
        """Gives the window another size."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)

    async def drawn(self) -> None:
        """Returns when the browser has drawn what changed."""
        await self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    async def js(self, expression: str) -> Any:
        """What an expression gives, awaited where it is a promise."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]["exception"]))
        return result["result"].get("value")

    async def click(self, selector: str) -> None:
        """Presses the mouse in the middle of an element, as a person would: whatever lies on top of it gets it."""
        x, y = await self.js(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            " found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        await self.drawn()

    async def press(self, key: str, text: str = "") -> None:
        """Presses a key, such as ``Tab``."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)
        await self.drawn()

    async def picture(self, height: int | None = None) -> bytes:
        """What the page looks like, as a PNG: all of it, or its first ``height`` pixels."""
        size = await self.js("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": height or size[1], "scale": 1}
        taken = await self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    async def _receive(self) -> dict[str, Any]:
        message = await self._socket.receive_json(timeout=_START_S)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.errors.append(json.dumps(params["args"]))
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
        if "method" in message:
            self._events.append(message["method"])
        return message


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """Starts Chromium with a fresh profile, and gives its one tab; ends it after."""
    with _running(profile) as process:
        port = await asyncio.to_thread(_port_of, process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                tabs = await reply.json(content_type=None)
            tab = next(tab for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=1 << 28) as socket:
                yield Page(socket)


@contextmanager
def _running(profile: Path) -> Iterator[subprocess.Popen[bytes]]:
    path = chromium()
    if path is None:
        raise RuntimeError("chromium is not installed")
    process = subprocess.Popen(
        [path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def _port_of(process: subprocess.Popen[bytes]) -> int:
    """Where it listens, which it says when it does."""
    said = []
    for line in process.stderr:
        said.append(line.decode(errors="replace"))
        if "DevTools listening on ws://" in said[-1]:
            return int(said[-1].rsplit(":", 1)[1].split("/")[0])
    raise RuntimeError(f"chromium ended: {''.join(said)}")
