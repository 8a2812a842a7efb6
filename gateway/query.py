"""A request as the routers see it: what was asked and what bounds its prompt, without any wire format."""

from gateway.admission.keys import Principal
from gateway.errors import InvalidRequest
from gateway.upstream.types import ChatCall
from routers.cost import ESTIMATED_BYTES_PER_TOKEN, PROMPT_MARGIN
from routers.policy import Policy
from routers.types import Hints, Query

_PROMPTS = {"chat.completions": "messages", "completions": "prompt", "embeddings": "input"}


def query_of(call: ChatCall, caller: Principal, *, at_ms: int, request_id: str = "") -> Query:
    """The same for a request that runs and for one that `explain` is asked about. `at_ms`: when it was asked."""
    headers = call.headers
    return Query(
        model=call.model,
        tenant=caller.tenant,
        input_tokens_estimate=-(-call.body_bytes // ESTIMATED_BYTES_PER_TOKEN),
        input_tokens_max=call.body_bytes + PROMPT_MARGIN if call.text_only else None,
        max_output_tokens=call.sampling.max_tokens,
        tags=headers.tags,
        needs_tools=call.has_tools,
        needs_format=call.has_format,
        needs_logprobs=call.sampling.logprobs,
        choices=call.choices,
        endpoint=call.endpoint,
        inputs=call.inputs,
        text=memoryview(call.fields[_PROMPTS[call.endpoint]]) if call.text_only else None,
        session=headers.session,
        run=headers.scope,
        hints=headers.hints,
        reasoning=call.sampling.reasoning_effort,
        key=caller.key_name,
        team=caller.team,
        id=request_id,
        at_ms=at_ms,
    )


def must_know(policy: Policy, hints: Hints | None) -> None:
    """Raises InvalidRequest where the caller's own choice of models names one that the policy does not have."""
    unknown = sorted((hints.models or frozenset()) - policy.models.keys()) if hints is not None else []
    if unknown:
        known = ", ".join(policy.models)
        raise InvalidRequest(f"x-leadline-models: {unknown[0][:80]!r} is no model of the policy; send some of {known}.")
