"""Request rates, token rates and concurrency: all limits of a caller are taken, or none.

Rates are GCRA (the leaky bucket as a meter): one number per limit, exact spacing, no windows to reset. In one worker
all of it is in process and nothing awaits; many workers share it through `shared_rates`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gateway.admission.keys import Principal
from gateway.errors import RateLimited
from gateway.upstream.types import ChatCall
from routers.cost import EXPECTED_OUTPUT_TOKENS
from routers.policy import Limit, Policy

MAX_TRACKED = 100_000
"""Meters kept in memory; past that, those at rest are forgotten, which changes nothing."""
MAX_CALLERS = 20_000
BYTES_PER_TOKEN = 4
TOLERANCE_S = 1e-9
CONCURRENCY_RETRY_S = 1.0
"""What a caller over its concurrency is told to wait: nobody knows when one of its requests ends."""

Kind = Literal["requests", "tokens", "concurrency"]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One limit of one caller."""

    kind: Kind
    scope: str
    """Whose meter it is: `key:<id>`, `team:<name>`, `tenant:<name>` or `run:<key id>:<name>`."""
    label: str
    """The same for people: `key first`."""
    count: int
    """Requests or tokens per span, which may come at once after a pause; or requests at a time."""
    per_s: int = 0
    """The span; 0 for concurrency."""
    interval_s: float = field(init=False)
    meter: str = field(init=False)
    """Names the meter; another count or span is another meter."""
    headers: tuple[tuple[bytes, bytes], bytes, bytes] = field(init=False, repr=False)
    """`x-ratelimit-limit-…` whole, and the names of `x-ratelimit-remaining-…` and `x-ratelimit-reset-…`."""

    def __post_init__(self) -> None:
        kind = self.kind.encode()
        names = (b"x-ratelimit-limit-" + kind, b"%d" % self.count), b"x-ratelimit-remaining-", b"x-ratelimit-reset-"
        object.__setattr__(self, "interval_s", self.per_s / self.count)
        object.__setattr__(self, "meter", f"{self.scope}|{self.kind}|{self.count}/{self.per_s}")
        object.__setattr__(self, "headers", (names[0], names[1] + kind, names[2] + kind))

    def refusal(self, wait_s: float) -> RateLimited:
        if self.kind == "concurrency":
            return RateLimited(
                f"Concurrency limit of {self.label}: {self.count} requests at a time are under way; retry when one "
                "has ended.",
                retry_after_s=CONCURRENCY_RETRY_S,
            )
        return RateLimited(
            f"Rate limit of {self.label}: faster than {self.count} {self.kind} per {self.per_s} s; "
            f"retry in {wait_s:.3f} s.",
            retry_after_s=wait_s,
            headers=rate_headers([(self, 0, wait_s + self.per_s)]),
        )


def rate_limits(policy: Policy, principal: Principal) -> tuple[RateLimit, ...]:
    """The rates, token rates and concurrency that hold for a caller's key, team and tenant."""
    who = {
        "key": (f"key:{principal.key_id}", f"key {principal.key_name}"),
        "team": (f"team:{principal.team}", f"team {principal.team}"),
        "tenant": (f"tenant:{principal.tenant}", f"tenant {principal.tenant}"),
    }
    limits = policy.limits_for(key=principal.key_name, team=principal.team, tenant=principal.tenant)
    return tuple(rate for limit in limits if limit.scope != "run" for rate in _rates_of(limit, *who[limit.scope]))


def run_rate_limits(policy: Policy, principal: Principal, path: str) -> tuple[RateLimit, ...]:
    """Those of the agent run at the root of a path such as `run42/research`."""
    root = path.partition("/")[0]
    scope = f"run:{principal.key_id}:{root}"
    return tuple(
        rate
        for limit in policy.limits
        if limit.scope == "run" and limit.name in ("*", root)
        for rate in _rates_of(limit, scope, f"run {root}")
    )


def _rates_of(limit: Limit, scope: str, label: str) -> Iterator[RateLimit]:
    if limit.rate is not None:
        yield RateLimit("requests", scope, label, limit.rate.count, limit.rate.per_s)
    if limit.tokens is not None:
        yield RateLimit("tokens", scope, label, limit.tokens.count, limit.tokens.per_s)
    if limit.concurrency is not None:
        yield RateLimit("concurrency", scope, label, limit.concurrency)


class LimitBook:
    """`rate_limits`, remembered: by key, for as long as its owner and the policy stay the same objects."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Policy, Principal, tuple[RateLimit, ...]]] = {}

    def of(self, policy: Policy, principal: Principal, run: str | None) -> tuple[RateLimit, ...]:
        if not policy.limits:
            return ()
        found = self._found.get(principal.key_id)
        if found is None or found[0] is not policy or found[1] is not principal:
            if len(self._found) >= MAX_CALLERS:
                self._found.clear()
            found = self._found[principal.key_id] = (policy, principal, rate_limits(policy, principal))
        return found[2] if run is None else found[2] + run_rate_limits(policy, principal, run)


class Grant(Protocol):
    """What an admitted request has taken of its limits."""

    @property
    def degraded(self) -> str | None:
        """Why the limits are approximate; None when they are not."""
        ...

    def release(self, actual_tokens: int) -> None:
        """Give the concurrency back and correct the tokens to what was used. Call it exactly once."""
        ...

    def headers(self) -> Headers:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, of the limit with the least left of each kind."""
        ...


class Rates(Protocol):
    """What lifecycle needs of rates."""

    book: LimitBook

    def start(self) -> None: ...

    async def admit(self, limits: tuple[RateLimit, ...], request_id: str, tokens: int) -> Grant:
        """Take one request and `tokens` estimated tokens of all limits, or of none. Raises RateLimited."""
        ...

    async def close(self) -> None: ...


class _NoLimit:
    """The grant of a caller without limits."""

    degraded = None

    def release(self, actual_tokens: int) -> None:
        pass

    def headers(self) -> Headers:
        return []


NO_LIMIT: Grant = _NoLimit()


class _Meter:
    __slots__ = ("due", "running")

    def __init__(self) -> None:
        self.due = 0.0
        """When the bucket will have drained: the more ahead of now, the fuller."""
        self.running = 0


class LocalRates:
    """In process. `clock` is any monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.book = LimitBook()
        self._clock = clock
        self._meters: dict[str, _Meter] = {}
        self._sweep_at = MAX_TRACKED

    def start(self) -> None:
        """Nothing runs beside it."""

    async def admit(self, limits: tuple[RateLimit, ...], request_id: str, tokens: int) -> Grant:
        return self.take(limits, tokens) if limits else NO_LIMIT

    def take(self, limits: tuple[RateLimit, ...], tokens: int) -> "LocalGrant":
        """`admit`, without a coroutine. Raises RateLimited."""
        now = self._clock()
        meters = self._meters
        for limit in limits:
            meter = meters.get(limit.meter)
            if limit.kind == "concurrency":
                if meter is not None and meter.running >= limit.count:
                    raise limit.refusal(0.0)
            else:
                weight = 1 if limit.kind == "requests" else charge(limit, tokens)
                due = now if meter is None or meter.due < now else meter.due
                wait = due + weight * limit.interval_s - now - limit.per_s
                if wait > TOLERANCE_S:
                    raise limit.refusal(wait)
        return self.book_in(limits, tokens)

    def book_in(self, limits: tuple[RateLimit, ...], tokens: int) -> "LocalGrant":
        """Take of all limits without asking whether there is room."""
        now = self._clock()
        meters = self._meters
        for limit in limits:
            meter = meters.get(limit.meter)
            if meter is None:
                meter = self._new_meter(limit.meter, now)
            if limit.kind == "concurrency":
                meter.running += 1
            else:
                weight = 1 if limit.kind == "requests" else charge(limit, tokens)
                meter.due = (meter.due if meter.due > now else now) + weight * limit.interval_s
        return LocalGrant(self, limits, tokens)

    def give_back(self, limits: tuple[RateLimit, ...], tokens: int, actual_tokens: int) -> None:
        meters = self._meters
        for limit in limits:
            meter = meters.get(limit.meter)
            if meter is None:
                meter = self._new_meter(limit.meter, self._clock())  # only one at rest is ever forgotten
            if limit.kind == "concurrency":
                meter.running -= 1
            elif limit.kind == "tokens":
                more = (actual_tokens - charge(limit, tokens)) * limit.interval_s
                # What has drained since needs no giving back: a bucket is never emptier than empty.
                meter.due = max(meter.due, self._clock() if more > 0 else 0.0) + more

    def left(self, limit: RateLimit) -> tuple[int, float]:
        """(requests or tokens that could come at once, seconds until all could)."""
        now = self._clock()
        meter = self._meters.get(limit.meter)
        reset_s = max(0.0, meter.due - now) if meter is not None else 0.0
        return max(0, int((limit.per_s - reset_s) / limit.interval_s + TOLERANCE_S)), reset_s

    def statistics(self) -> dict[str, int]:
        return {"meters": len(self._meters), "running": sum(meter.running for meter in self._meters.values())}

    async def close(self) -> None:
        self._meters.clear()

    def _new_meter(self, name: str, now: float) -> _Meter:
        if len(self._meters) >= self._sweep_at:
            self._meters = {name: meter for name, meter in self._meters.items() if meter.running or meter.due > now}
            self._sweep_at = max(MAX_TRACKED, 2 * len(self._meters))
        meter = self._meters[name] = _Meter()
        return meter


class LocalGrant:
    """A Grant of `LocalRates`."""

    __slots__ = ("_limits", "_rates", "_released", "_tokens")
    degraded = None

    def __init__(self, rates: LocalRates, limits: tuple[RateLimit, ...], tokens: int) -> None:
        self._rates = rates
        self._limits = limits
        self._tokens = tokens
        self._released = False

    def release(self, actual_tokens: int) -> None:
        if self._released:
            raise RuntimeError("a grant is released once")
        self._released = True
        self._rates.give_back(self._limits, self._tokens, actual_tokens)

    def headers(self) -> Headers:
        return rate_headers([(limit, *self._rates.left(limit)) for limit in self._limits if limit.per_s])


def charge(limit: RateLimit, tokens: int) -> int:
    """What a call is charged when it comes in: one larger than the whole span is let through by a full bucket, and its
    true size, charged at its end, keeps the next ones waiting."""
    return tokens if tokens < limit.count else limit.count


def tokens_estimate(call: ChatCall) -> int:
    """Tokens a call is expected to take, prompt and answers: what is charged until its end tells."""
    prompt = -(-call.body_bytes // BYTES_PER_TOKEN)
    if call.endpoint == "embeddings":
        return prompt
    cap = call.sampling.max_tokens
    output = EXPECTED_OUTPUT_TOKENS if cap is None else min(cap, EXPECTED_OUTPUT_TOKENS)
    return prompt + output * call.choices * call.inputs


def rate_headers(left: Iterable[tuple[RateLimit, int, float]]) -> Headers:
    """OpenAI's headers from (limit, remaining, seconds to reset), of the limit of each kind with the least left."""
    tightest: dict[Kind, tuple[RateLimit, int, float]] = {}
    for entry in left:
        kind = entry[0].kind
        if kind not in tightest or entry[1] < tightest[kind][1]:
            tightest[kind] = entry
    headers: Headers = []
    for limit, remaining, reset_s in tightest.values():
        whole, remaining_name, reset_name = limit.headers
        headers += (whole, (remaining_name, b"%d" % remaining), (reset_name, duration(reset_s).encode()))
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `8.64s`, `6m0s`."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    return f"{minutes}m{ms / 1000:g}s" if minutes else f"{ms / 1000:g}s"
