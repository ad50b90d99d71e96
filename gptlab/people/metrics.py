"""What Prometheus reads at /metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptlab.people.backend import Ask, Backend, Model, Piece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The collectors of one app, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        of: Any = {"registry": self.registry}
        self.requests = prometheus_client.Counter(
            "gptlab_requests", "Requests by route and status.", ("route", "status"), **of
        )
        self.seconds = prometheus_client.Histogram(
            "gptlab_request_seconds", "Until the response is complete.", ("route",),
            buckets=_SECONDS, **of,
        )  # fmt: skip
        self.tokens = prometheus_client.Counter(
            "gptlab_tokens", "Tokens by model and kind (prompt, cached, completion).",
            ("model", "kind"), **of,
        )  # fmt: skip
        self.replies = prometheus_client.Counter(
            "gptlab_replies", "Replies by model and what ended them.", ("model", "reason"), **of
        )
        self.first = prometheus_client.Histogram(
            "gptlab_time_to_first_token_seconds", "From the request, waiting included.", ("model",),
            buckets=_SECONDS, **of,
        )  # fmt: skip
        self.each = prometheus_client.Histogram(
            "gptlab_time_per_token_seconds", "After the first, mean of a reply.", ("model",),
            buckets=_TOKEN_SECONDS, **of,
        )  # fmt: skip

    def watch(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        """Adds gauges of engines: `stats` is asked at every scrape."""
        self.registry.register(_Engines(stats))

    def text(self) -> bytes:
        """In Prometheus's format."""
        return prometheus_client.generate_latest(self.registry)


class _Engines:
    """Collects what engines say of themselves."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]):
        self._stats = stats

    def collect(self) -> list[Any]:
        gauges = {
            "waiting": "Requests in the queue.",
            "running": "Slots in use.",
            "slots": "Slots.",
            "steps": "Steps of all running slots so far.",
            "prompt_tokens": "Tokens of prompts that were begun.",
            "cached_tokens": "Those of them that were in the cache.",
        }
        stats = self._stats()
        families = []
        for name, text in gauges.items():
            family = GaugeMetricFamily(f"gptlab_engine_{name}", text, labels=("model",))
            for model, values in stats.items():
                family.add_metric((model,), getattr(values, name))
            families.append(family)
        return families


class Metered:
    """A Backend whose replies are measured."""

    def __init__(self, backend: Backend, metrics: Metrics):
        self._backend, self._metrics = backend, metrics

    def models(self) -> Sequence[Model]:
        """See Backend."""
        return self._backend.models()

    async def close(self, drain_seconds: float) -> None:
        """See Backend."""
        await self._backend.close(drain_seconds)

    async def reply(self, ask: Ask, deadline: float | None = None) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        begun, first, ended = time.monotonic(), None, "error"
        metrics = self._metrics
        try:
            async with contextlib.aclosing(self._backend.reply(ask, deadline)) as pieces:
                async for piece in pieces:
                    if first is None:
                        first = time.monotonic()
                        metrics.first.labels(ask.model).observe(first - begun)
                    if piece.usage is not None:
                        usage = piece.usage
                        for kind in ("prompt", "cached", "completion"):
                            count = getattr(usage, f"{kind}_tokens")
                            metrics.tokens.labels(ask.model, kind).inc(count)
                        if usage.completion_tokens > 1:
                            each = (time.monotonic() - first) / (usage.completion_tokens - 1)
                            metrics.each.labels(ask.model).observe(each)
                    ended = piece.finish_reason or "cancelled"
                    yield piece
        finally:
            if first is not None:
                metrics.replies.labels(ask.model, ended).inc()


class Counted:
    """ASGI middleware: counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 500, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            # The route and not the path: the paths that a scanner asks for are without number.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - begun)
