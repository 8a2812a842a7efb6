"""Every error a caller can meet, and the OpenAI error body it turns into.

    LeadlineError
    ├── InvalidRequest              400  the request is wrong: fix it
    │   ├── IdempotencyMismatch     400  the Idempotency-Key came before, with another body: take a new key
    │   ├── ContextLengthExceeded   400  it does not fit any allowed model: shorten it
    │   ├── BodyTooLarge            413  it does not fit the gateway: shrink it
    │   └── UnsupportedEncoding     415  its body is compressed: send it plain
    ├── Unauthenticated             401  no key, or not one of ours
    ├── Forbidden                   403  a good key without the right
    ├── UnknownModel                404  no such model or alias in the policy
    ├── NotFound                    404  no such object or path
    ├── MethodNotAllowed            405  this path takes another method
    ├── Conflict                    409  it does not go with how things are: change it, or them
    │   ├── RequestUnderWay         409  the same Idempotency-Key is under way: wait
    │   └── OutcomeUnknown          409  … or its answer is lost: look at its receipt
    ├── RateLimited                 429  too fast: wait `retry_after_s`
    ├── BudgetExceeded              429  no money left: raise the budget or wait for its window
    ├── UpstreamRefused             4xx  the provider refused the request itself: its own words, passed on
    ├── UpstreamFailed              502  the provider failed, and so did what stood behind it
    │   ├── UpstreamTimeout         504  … by not answering in time
    │   │   └── DeadlineExceeded    504  … before the request's own deadline: allow more
    │   └── UpstreamRateLimited     429  … by limiting the gateway: wait `retry_after_s`
    ├── Unavailable                 503  nothing can serve this now: wait
    └── InternalError               500  our fault

Lower packages raise their own errors; `gateway` maps each of them here once, and `edge` turns these into HTTP once.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar


class LeadlineError(Exception):
    """Base of all. `message` names the field, the value and the fix; `param` the offending field of the request."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    should_retry: bool = False
    """What `x-should-retry` tells the caller's client; an instance may know better than its class."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s: float | None = None
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        """What the answer says beside its body, e.g. the limit that was met."""

    @property
    def http_status(self) -> int:
        return self.status

    def body(self) -> dict[str, object]:
        """OpenAI's error shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(LeadlineError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class IdempotencyMismatch(InvalidRequest):
    code = "idempotency_mismatch"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"


class UnsupportedEncoding(InvalidRequest):
    status = 415
    code = "unsupported_encoding"


class Unauthenticated(LeadlineError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = ((b"www-authenticate", b"Bearer"),)


class Forbidden(LeadlineError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class UnknownModel(LeadlineError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class NotFound(LeadlineError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(LeadlineError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.headers = ((b"allow", ", ".join(sorted(allowed)).encode()),)


class Conflict(LeadlineError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class RequestUnderWay(Conflict):
    code = "idempotency_conflict"
    should_retry = True


class OutcomeUnknown(Conflict):
    code = "idempotency_unknown"


class RateLimited(LeadlineError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    should_retry = True

    def __init__(self, message: str, *, retry_after_s: float, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = headers


class BudgetExceeded(LeadlineError):
    status = 429
    type = "budget_exceeded"
    code = "budget_exceeded"


class UpstreamRefused(LeadlineError):
    """The provider says that the request itself is wrong. Its status and its own error object are passed on.

    `before`: how the attempts before this one failed; empty: there were none.
    """

    type = "invalid_request_error"
    code = "upstream_refused"

    def __init__(
        self, message: str, *, upstream_status: int, error: dict[str, object] | None, provider: str, before: str = ""
    ) -> None:
        super().__init__(f"{message} Before that: {before}." if before else message)
        self.before = before
        self.upstream_status = upstream_status
        self.error = error
        self.provider = provider

    @property
    def http_status(self) -> int:
        return self.upstream_status

    def body(self) -> dict[str, object]:
        if self.error is None:
            return super().body()
        before = {"before": self.before} if self.before else {}
        return {"error": {**self.error, "provider": self.provider, **before}}


class UpstreamFailed(LeadlineError):
    status = 502
    type = "upstream_error"
    code = "upstream_failed"
    should_retry = True


class UpstreamTimeout(UpstreamFailed):
    status = 504
    code = "upstream_timeout"


class DeadlineExceeded(UpstreamTimeout):
    code = "deadline_exceeded"
    should_retry = False


class UpstreamRateLimited(UpstreamFailed):
    status = 429
    type = "rate_limit_error"
    code = "upstream_rate_limited"


class Unavailable(LeadlineError):
    status = 503
    type = "service_unavailable"
    code = "unavailable"
    should_retry = True

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InternalError(LeadlineError):
    """Something in the gateway broke; the cause is in the log under the request id, not in the answer."""
