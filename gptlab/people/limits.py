"""How much a caller may ask for: requests a minute, bytes a request, seconds to send them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptlab.people.openai_errors import ApiError

_CALLERS = 10_000  # that are remembered


class RateLimit:
    """A token bucket of one minute for each caller, in memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # (tokens left, when)

    def take(self, caller: str, per_minute: int) -> float:
        """0 if the caller may ask now, else the seconds until then."""
        now, full = self._clock(), float(per_minute)
        left, then = self._buckets.pop(caller, (full, now))
        left = min(full, left + (now - then) * full / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / full
        self._buckets[caller] = (left - (not wait), now)  # moved to the end
        if len(self._buckets) > _CALLERS:
            del self._buckets[next(iter(self._buckets))]
        return wait


class BodyLimit:
    """ASGI middleware: a body that is too large or takes too long is not read to its end.

    A client that sends byte after byte would otherwise keep its connection for ever.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything but such requests on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body = bytearray()
        try:
            # (An int of thousands of digits would be an error of its own.)
            if not declared.isdigit() or int(declared[:18]) > self._max_bytes:
                raise self._too_large()
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            late = ApiError(408, f"the request took more than {self._seconds:g} s to arrive")
            late.headers["Connection"] = "close"
            await late.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def again() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, again, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._max_bytes} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )
