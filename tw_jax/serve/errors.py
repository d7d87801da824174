"""Errors as OpenAI's clients read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

INTERNAL = "internal error; the server's log says more"
MAX_MESSAGE = 500  # characters


class ApiError(HTTPException):
    """A request that is answered with an error.

    Attributes:
      status: HTTP status.
      message: what is wrong, and the remedy.
      type: OpenAI's class of errors.
      param: the field at fault.
      code: a word for programs.
      retry_after_s: when to try again, for the header `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """See the class."""
        # Clients' words are repeated in messages: briefly, and without lone surrogates, which JSON
        # can smuggle in.
        message, param = _clean(message), None if param is None else _clean(param)
        # Of this class, since FastAPI lets no other pass while it reads a body.
        super().__init__(status, message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that clients get."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def _clean(text: str) -> str:
    shown = text.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= MAX_MESSAGE else f"{shown[:MAX_MESSAGE]}..."


def internal_error() -> ApiError:
    """A failure of ours, which says nothing about the inside."""
    return ApiError(500, INTERNAL, type="server_error", code="internal_error")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for a body that FastAPI could not read; names the first field at fault.

    A field that takes several types fails once for each of them: their messages are put together.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    place = [str(part) for part in first["loc"][1:]]
    if not place:
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            message = "the body must be a JSON object, sent as Content-Type: application/json"
        # Our own checks of whole bodies say `field: what is wrong`.
        field = message.partition(":")[0] if first["type"] == "value_error" else None
        return ApiError(400, message, param=field, code="invalid_value")
    field = place[0]
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{'.'.join(place)}: this server knows no such field; leave it out",
            param=field, code="unknown_parameter",
        )  # fmt: skip
    same = [error for error in errors if list(error["loc"][1:2]) == [first["loc"][1]]]
    reasons = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in same)
    where = ".".join(place) if len(same) == 1 else field
    return ApiError(400, f"{where}: {', or '.join(reasons)}", param=field, code="invalid_value")
