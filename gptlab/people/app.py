"""The application: OpenAI's API, health and metrics, around one Backend."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import gptlab
from gptlab.people import api
from gptlab.people.backend import Backend, Busy, Caller, Invalid, Refused, Unavailable
from gptlab.people.limits import BodyLimit
from gptlab.people.metrics import Counted, Metered, Metrics
from gptlab.people.openai_errors import ApiError, explain
from gptlab.run import errors

_ERRORS = (
    ApiError, Invalid, Refused, Busy, Unavailable, RequestValidationError, HTTPException, Exception,
)  # fmt: skip


class _Placed(logging.Filter):
    """Of errors in a log, leaves type and place: their messages may hold what somebody wrote."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            said = record.getMessage().partition("\n")[0]
            record.msg, record.args = f"{said}: {errors.place(record.exc_info[1])}", ()
            record.exc_info = record.exc_text = None
        return True


_PLACED = _Placed()  # one: a logger has it once, however many apps there are


def make(
    backend: Backend,
    *,
    check_key: Callable[[str], Caller | None] | None,
    limits: api.Limits,
    max_body_bytes: int,
    body_seconds: float,
    allowed_hosts: Sequence[str],
    drain_seconds: float,
    stats: Callable[[], Mapping[str, Any]] | None = None,
    failures: Callable[[], Sequence[str]] = tuple,
) -> FastAPI:
    """The ASGI application.

    Args:
      backend: what answers; closed when the application ends.
      check_key: of API keys; None: none are needed.
      limits: of each caller of the API.
      max_body_bytes: of any request.
      body_seconds: in which it has to arrive.
      allowed_hosts: what a request's Host may be, so that a page elsewhere can't reach a server on
        127.0.0.1 under a name of its own; '*': anything.
      drain_seconds: that running replies have at the end.
      stats: of engines, for /metrics.
      failures: what /healthz tells of; nothing: all is well.
    """
    for name in ("uvicorn.error", "asyncio"):  # they tell of defects in what they run
        logging.getLogger(name).addFilter(_PLACED)
    metrics = Metrics()
    if stats is not None:
        metrics.watch(stats)
    backend = Metered(backend, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close(drain_seconds)

    app = FastAPI(
        title="gptlab", version=gptlab.__version__, lifespan=lifespan,
        docs_url=None, redoc_url=None,  # they load scripts from elsewhere
    )  # fmt: skip
    app.state.backend, app.state.metrics = backend, metrics
    app.include_router(api.router(backend, check_key, limits))
    for kind in _ERRORS:
        app.add_exception_handler(kind, _explained)

    @app.get("/healthz", responses={503: {}}, tags=["server"])
    async def healthz() -> JSONResponse:
        """Whether replies can be had."""
        failed = list(failures())
        body = {"status": "failed" if failed else "ok", "failures": failed}
        return JSONResponse(body, 503 if failed else 200)

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics_page() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, seconds=body_seconds)
    app.add_middleware(Counted, metrics=metrics)
    return app


async def _explained(request: Request, error: Exception) -> JSONResponse:
    return explain(error).response()
