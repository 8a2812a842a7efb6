"""`openai.OpenAI` and `openai.AsyncOpenAI` with the gateway's address, and what only a gateway can answer.

Everything that works on openai's clients works on these, `with_options` included. Nothing here is needed to use the
gateway: plain `openai` with its `base_url` does, and the same headers and endpoints are open to it.
"""

from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Self

import httpx2
import openai

from gateway.sdk import wire
from gateway.sdk.errors import named
from gateway.sdk.types import Explanation, Outcome, Receipt, Spend, usd


class Leadline(openai.OpenAI):
    """An `openai.OpenAI` that knows its gateway.

    `api_key`: else LEADLINE_API_KEY, else the file `key` in LEADLINE_HOME (~/.leadline). `base_url`: else
    LEADLINE_BASE_URL, else http://127.0.0.1:8080/v1. `options` are those of `openai.OpenAI`.
    """

    def __init__(self, *, api_key: str | None = None, base_url: str | httpx2.URL | None = None, **options: Any) -> None:
        super().__init__(api_key=api_key or wire.find_key(), base_url=base_url or wire.find_base_url(), **options)

    def receipt(self, response: object) -> Receipt:
        """What `response` cost and why it came from where it did. A stream has its receipt once it has ended."""
        path = f"/leadline/v1/requests/{wire.request_id_of(response)}"
        return Receipt.model_validate(self.get(self._beside_v1(path), cast_to=object))

    def feedback(
        self,
        response: object,
        *,
        accept: bool | None = None,
        score: float | None = None,
        comment: str | None = None,
        source: str | None = None,
    ) -> Outcome:
        """Say what `response` was worth: `accept` or not, or a `score` from 0 to 1. `source` tells judges apart,
        of each of whom the last word counts."""
        path = f"/leadline/v1/requests/{wire.request_id_of(response)}/feedback"
        body = wire.feedback_body(accept, score, comment, source)
        return Outcome.model_validate(self.post(self._beside_v1(path), body=body, cast_to=object))

    def explain(
        self, prompt: wire.Prompt, *, model: str = "auto", max_tokens: int | None = None, tags: Iterable[str] = ()
    ) -> Explanation:
        """What would be decided for this prompt now. Nothing runs and nothing is spent."""
        body = wire.explain_body(prompt, model, max_tokens, tags)
        return Explanation.model_validate(self.post(self._beside_v1("/leadline/v1/explain"), body=body, cast_to=object))

    def spend(self, *, hours: float = 720) -> Spend:
        """Totals of the key's tenant (an admin's: of all) over the last `hours`."""
        return self._spend({"hours": hours})

    def budget(self, limit: wire.Money, *, name: str | None = None) -> "Scoped":
        """A client that can spend at most `limit` dollars; past that, calls raise BudgetExceeded and do not run.

        A `name` shares the scope, and what it has spent, with every client of this key that uses the name; without
        one the scope is new.
        """
        return Scoped(**_options(self, wire.scope_headers(limit, name)))

    def tagged(self, *tags: str) -> Self:
        """A client whose requests carry these tags, too: the policy's routes may ask for them."""
        return self.with_options(default_headers=wire.tag_headers(tags, self._custom_headers))

    def narrowed(
        self,
        *,
        max_cost: wire.Money | None = None,
        min_quality: float | None = None,
        effort: str | None = None,
        models: Iterable[str] | None = None,
    ) -> Self:
        """A client whose requests ask for less than the policy allows: at most this expected cost in dollars, at
        least this chance of a good answer, at most this effort (none, low, high), only these models. What it has asked
        for already still holds."""
        hints = wire.hint_headers(self._custom_headers, max_cost, min_quality, effort, models)
        return self.with_options(default_headers=hints)

    def _spend(self, query: dict[str, object]) -> Spend:
        found = self.get(self._beside_v1("/leadline/v1/spend"), cast_to=object, options={"params": query})
        return Spend.model_validate(found)

    def _beside_v1(self, path: str) -> str:
        return _beside_v1(self.base_url, path)

    def _make_status_error(self, err_msg: str, *, body: object, response: httpx2.Response) -> openai.APIStatusError:
        return named(super()._make_status_error(err_msg, body=body, response=response))


class Scoped(Leadline):
    """A client inside a budget. Leaving its `with` block ends nothing: what was spent stays spent, the limit holds."""

    @property
    def scope(self) -> str:
        return self._custom_headers[wire.SCOPE]

    @property
    def limit_usd(self) -> Decimal:
        return Decimal(self._custom_headers[wire.SCOPE_BUDGET])

    def spent(self) -> Decimal:
        """Dollars that the scope has spent, ever."""
        return usd(self._spend({"hours": wire.ALL_HOURS, "scope": self.scope}).cost_nanousd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The connections belong to the client that this one came from."""


class AsyncLeadline(openai.AsyncOpenAI):
    """The asynchronous twin of Leadline."""

    def __init__(self, *, api_key: str | None = None, base_url: str | httpx2.URL | None = None, **options: Any) -> None:
        super().__init__(api_key=api_key or wire.find_key(), base_url=base_url or wire.find_base_url(), **options)

    async def receipt(self, response: object) -> Receipt:
        """See `Leadline.receipt`."""
        path = f"/leadline/v1/requests/{wire.request_id_of(response)}"
        return Receipt.model_validate(await self.get(self._beside_v1(path), cast_to=object))

    async def feedback(
        self,
        response: object,
        *,
        accept: bool | None = None,
        score: float | None = None,
        comment: str | None = None,
        source: str | None = None,
    ) -> Outcome:
        """See `Leadline.feedback`."""
        path = f"/leadline/v1/requests/{wire.request_id_of(response)}/feedback"
        body = wire.feedback_body(accept, score, comment, source)
        return Outcome.model_validate(await self.post(self._beside_v1(path), body=body, cast_to=object))

    async def explain(
        self, prompt: wire.Prompt, *, model: str = "auto", max_tokens: int | None = None, tags: Iterable[str] = ()
    ) -> Explanation:
        """See `Leadline.explain`."""
        body = wire.explain_body(prompt, model, max_tokens, tags)
        found = await self.post(self._beside_v1("/leadline/v1/explain"), body=body, cast_to=object)
        return Explanation.model_validate(found)

    async def spend(self, *, hours: float = 720) -> Spend:
        """See `Leadline.spend`."""
        return await self._spend({"hours": hours})

    def budget(self, limit: wire.Money, *, name: str | None = None) -> "AsyncScoped":
        """See `Leadline.budget`; used with `async with`."""
        return AsyncScoped(**_options(self, wire.scope_headers(limit, name)))

    def tagged(self, *tags: str) -> Self:
        """See `Leadline.tagged`."""
        return self.with_options(default_headers=wire.tag_headers(tags, self._custom_headers))

    def narrowed(
        self,
        *,
        max_cost: wire.Money | None = None,
        min_quality: float | None = None,
        effort: str | None = None,
        models: Iterable[str] | None = None,
    ) -> Self:
        """See `Leadline.narrowed`."""
        hints = wire.hint_headers(self._custom_headers, max_cost, min_quality, effort, models)
        return self.with_options(default_headers=hints)

    async def _spend(self, query: dict[str, object]) -> Spend:
        found = await self.get(self._beside_v1("/leadline/v1/spend"), cast_to=object, options={"params": query})
        return Spend.model_validate(found)

    def _beside_v1(self, path: str) -> str:
        return _beside_v1(self.base_url, path)

    def _make_status_error(self, err_msg: str, *, body: object, response: httpx2.Response) -> openai.APIStatusError:
        return named(super()._make_status_error(err_msg, body=body, response=response))


class AsyncScoped(AsyncLeadline):
    """See `Scoped`."""

    @property
    def scope(self) -> str:
        return self._custom_headers[wire.SCOPE]

    @property
    def limit_usd(self) -> Decimal:
        return Decimal(self._custom_headers[wire.SCOPE_BUDGET])

    async def spent(self) -> Decimal:
        """See `Scoped.spent`."""
        return usd((await self._spend({"hours": wire.ALL_HOURS, "scope": self.scope})).cost_nanousd)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """The connections belong to the client that this one came from."""


def _options(client: Leadline | AsyncLeadline, headers: dict[str, str]) -> dict[str, Any]:
    """What makes a client of another class like this one, its connections included, that also sends `headers`."""
    return {
        "api_key": client.api_key,
        "base_url": client.base_url,
        "organization": client.organization,
        "project": client.project,
        "timeout": client.timeout,
        "max_retries": client.max_retries,
        "default_headers": {**client._custom_headers, **headers},
        "default_query": client._custom_query,
        "http_client": client._client,
    }


def _beside_v1(base_url: httpx2.URL, path: str) -> str:
    """The gateway's own endpoints stand beside `/v1`, not below it."""
    root = str(base_url).rstrip("/").removesuffix("/v1")
    return root + path
