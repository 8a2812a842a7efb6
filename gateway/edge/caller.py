"""Who is calling, and what answers: the dependencies of every path that FastAPI serves."""

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from gateway.admission.keys import Principal
from gateway.edge.headers import read_headers
from gateway.edge.state import State
from gateway.lifecycle import Lifecycle


def state_of(request: Request) -> State:
    state: State = request.app.state.parts
    return state


def lifecycle_of(request: Request) -> Lifecycle:
    return state_of(request).lifecycle


BEARER = HTTPBearer(auto_error=False, description="A key of this gateway: `sk-ll-…`.")
"""For /openapi.json alone: the header is read by `read_headers`."""


async def caller(request: Request, _: Annotated[object, Security(BEARER)]) -> Principal:
    """The key's owner. Raises Unauthenticated."""
    return await lifecycle_of(request).keys.recognise(read_headers(request.scope["headers"]).token)


Caller = Annotated[Principal, Depends(caller)]
TheLifecycle = Annotated[Lifecycle, Depends(lifecycle_of)]
TheState = Annotated[State, Depends(state_of)]
