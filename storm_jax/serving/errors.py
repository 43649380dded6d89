"""What a client is told when a request cannot be served, in the form of OpenAI's API."""

from typing import Any


class ApiError(Exception):
    """A refusal that reaches the client as {"error": {...}} with an HTTP status.

    Attributes:
      status: 4xx where the client can do something about it, 5xx where it cannot.
      message: says what is wrong and what would help.
      code: a word for programs, such as "context_length_exceeded".
      param: the field of the request, such as "messages[0].content[1]"; None: no single one.
      retry_after: seconds after which trying again makes sense; None: it does not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.retry_after = param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients read."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }  # fmt: skip
        return {"error": error}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return headers


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that is wrong in itself: status 400."""
    return ApiError(400, message, code, param)
