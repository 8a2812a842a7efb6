"""What the paths beside the data plane ask: one worker's parts, once they are up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.learned import Learned
from gateway.lifecycle import Lifecycle
from gateway.reload import PolicyReloader
from gateway.telemetry.peers import Peers

if TYPE_CHECKING:
    from gateway.redis_link import RedisLink  # its client would be 7 MB where there is no Redis


@dataclass
class State:
    lifecycle: Lifecycle
    learned: Learned
    pepper: bytes
    shared: bool
    """Other workers serve from the same database."""
    redis: "RedisLink | None" = None
    peers: Peers | None = None
    reloader: PolicyReloader | None = None
