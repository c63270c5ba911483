"""An application called in the process of the test."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx

BASE = "http://127.0.0.1:8000"


class Client:
    """The application called in this process, its lifespan included, through a plain synchronous interface."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=BASE)
        self._life = app.router.lifespan_context(app)
        self._wait(self._life.__aenter__())

    def _wait(self, awaitable: Any) -> Any:
        async def run() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._wait(self._http.request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.request("POST", path, **({"json": body} if body is not None else {}), **options)

    def together(self, calls: list[tuple[str, Any]]) -> list[httpx.Response]:
        async def run() -> list[httpx.Response]:
            return await asyncio.gather(*(self._http.post(path, json=body) for path, body in calls))

        return self._wait(run())

    def close(self) -> None:
        self._wait(self._life.__aexit__(None, None, None))
        self._wait(self._http.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
