"""Every way in which an HTTP exchange with an upstream can fail.

HttpError
├── ConnectError              no connection: not a byte of the request has gone out
│   ├── NameNotFound          the host has no address
│   ├── ConnectRefused        nobody answers there, or no route leads there
│   ├── TlsFailed             no TLS that we accept: certificate, host name, protocol
│   └── ConnectTimeout        not connected in `connect_s`
├── ExchangeTimeout
│   ├── FirstByteTimeout      no byte of the answer's body in `first_byte_s`
│   ├── IdleTimeout           then nothing for `idle_s`
│   └── DeadlineExceeded      the whole took longer than `total_s`
├── ConnectionCut             the server went away too early …
│   ├── ClosedBeforeHeaders   … before it said anything
│   ├── ClosedInHeaders       … in the middle of its headers
│   └── TruncatedBody         … before the end of its body
└── BadResponse               what it sent cannot be taken
    ├── MalformedResponse     no HTTP/1.x
    ├── HeadersTooLarge       more headers than anyone needs
    ├── UnsupportedEncoding   an encoding that was not asked for: nothing here decompresses
    └── BodyTooLarge          a body beyond the reader's bound
"""


class HttpError(Exception):
    """`may_be_billed`: a byte of the request can have reached the server. `reused`: the connection had served."""

    may_be_billed = True

    def __init__(self, message: str, *, reused: bool = False) -> None:
        super().__init__(message)
        self.reused = reused


class ConnectError(HttpError):
    may_be_billed = False


class NameNotFound(ConnectError):
    pass


class ConnectRefused(ConnectError):
    pass


class TlsFailed(ConnectError):
    pass


class ConnectTimeout(ConnectError):
    pass


class ExchangeTimeout(HttpError):
    pass


class FirstByteTimeout(ExchangeTimeout):
    pass


class IdleTimeout(ExchangeTimeout):
    pass


class DeadlineExceeded(ExchangeTimeout):
    pass


class ConnectionCut(HttpError):
    pass


class ClosedBeforeHeaders(ConnectionCut):
    pass


class ClosedInHeaders(ConnectionCut):
    pass


class TruncatedBody(ConnectionCut):
    pass


class BadResponse(HttpError):
    pass


class MalformedResponse(BadResponse):
    pass


class HeadersTooLarge(BadResponse):
    pass


class UnsupportedEncoding(BadResponse):
    pass


class BodyTooLarge(BadResponse):
    pass
