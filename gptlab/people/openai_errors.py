"""Errors in OpenAI's format, whoever raises them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gptlab.data.tokenizer import valid_text
from gptlab.people.backend import Busy, Invalid, Refused, Unavailable, UnknownModel

_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large"}


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """In OpenAI's format."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        text = valid_text(str(self))
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As HTTP."""
        return JSONResponse(self.body(), self.status, self.headers)


def explain(error: Exception) -> ApiError:
    """What a client is told of an error; of a defect no more than that there is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), "model", "model_not_found")
    if isinstance(error, Invalid):
        return ApiError(400, str(error), error.param, "invalid_value")
    if isinstance(error, Refused):
        return ApiError(400, "the prompt was refused by moderation", "messages", "content_filter")
    if isinstance(error, Busy):
        headers = {"Retry-After": str(math.ceil(error.retry_after))}
        status, code = (503, "draining") if error.draining else (429, "queue_full")
        return ApiError(status, str(error), code=code, headers=headers)
    if isinstance(error, Unavailable):
        return ApiError(502, str(error), code="unavailable")
    if isinstance(error, RequestValidationError):
        return _validation(error)
    if isinstance(error, HTTPException):
        return ApiError(
            error.status_code,
            str(error.detail),
            code=_CODES.get(error.status_code, "invalid_request"),
            headers=error.headers,
        )
    return ApiError(500, "the server has failed", code="internal_error")


def _validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request's body."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if kind == "model_attributes_type" and not place:
        message = "the body is no JSON object; send it with 'Content-Type: application/json'"
        return ApiError(400, message, code="invalid_json")
    if kind == "unsupported_parameter":
        return ApiError(400, message, first["ctx"]["name"], "unsupported_parameter")
    param = ".".join(place) or None
    if kind == "extra_forbidden":
        message = "unrecognized request argument"
        return ApiError(400, f"{message}: {param}", param, "unknown_parameter")
    if kind == "missing" and param:
        return ApiError(400, f"missing required parameter: {param}", param, "missing_parameter")
    return ApiError(400, f"{param or 'the body'}: {message}", param, "invalid_value")
