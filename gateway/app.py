"""Build every part once, wire them up, start and stop them in order: the application of one worker."""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from sqlalchemy.exc import IntegrityError

from gateway.admission.budgets import Budgets
from gateway.admission.idempotency import IdempotencyStore
from gateway.admission.keys import KeyStore, PepperError, load_pepper
from gateway.admission.rates import LocalRates, Rates
from gateway.admission.shared_budgets import SharedBudgets, connect_budgets
from gateway.cache.exact import ExactCache, MemoryCache
from gateway.edge import monitoring
from gateway.edge.asgi import Receive, Scope, Send, identified, limited
from gateway.edge.dataplane import Endpoint, data_plane
from gateway.edge.state import State
from gateway.engine_keepers import EngineKeeper, OwnEngines
from gateway.engine_link import EngineConnection
from gateway.engine_process import EngineProcess
from gateway.engines import Engines
from gateway.learned import Learned
from gateway.ledger import budget_rows, report
from gateway.ledger.claim import DatabaseClaim, DatabaseClaimed
from gateway.ledger.journal import Journal, JournalError, to_disk
from gateway.ledger.store import LedgerStore, LedgerUnreachable, connect
from gateway.lifecycle import Lifecycle
from gateway.reload import PolicyReloader
from gateway.sessions import MemorySessions, Store
from gateway.settings import Settings, engine_socket
from gateway.signals import SignalReader
from gateway.telemetry.logs import get_logger
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.peers import Peers
from gateway.upstream.http import HttpClient
from gateway.world import MissingSecret, World, build_world
from routers.policy import Policy

if TYPE_CHECKING:
    from fastapi import FastAPI

    from gateway.redis_link import RedisLink

log = get_logger(__name__)

MAX_WEB_BODY_BYTES = 1 << 20
"""Of everything but the data plane: log-in forms, explain."""
ENGINE_GREETING_S = 2.0
"""How long a start waits for an engine that is already up."""
OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
KEY_POLL_S = 0.5
"""Keys made or revoked by other processes (the command line) are seen this soon."""


class App:
    """The ASGI application. The data plane, health and metrics are answered directly, all else by FastAPI, which is
    loaded when it is first asked: a worker that only serves models starts a quarter sooner and is 10 MB smaller."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        policy_folder: Path | None = None,
        policy_file: Path | None = None,
        keeper: EngineKeeper | None = None,
    ) -> None:
        """`keeper`: of the engines, where this process is not to keep up its own."""
        self.settings = settings
        self.policy = policy
        self.policy_folder = policy_folder or Path.cwd()
        """What the policy's relative paths are relative to."""
        self.policy_file = policy_file
        """Watched while the gateway runs; None: the policy stays as it is."""
        self._reloader: PolicyReloader | None = None
        self._state: State | None = None
        self._web: FastAPI | None = None
        self._web_loading = asyncio.Lock()
        self._keeper = keeper
        self._engines: Engines | None = None
        self.first_key: str | None = None
        """The key that `start` made because there was none; None on later starts."""
        self.start_failed: str | None = None
        """Why it does not serve, where its start failed."""
        self._data_plane: Mapping[str, Endpoint] = {}
        self._stack = contextlib.AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._data_plane.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is not None:
            await endpoint(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["path"] in monitoring.PATHS:
            await monitoring.answer(self.state, scope, receive, send)
        else:
            web = await self.web()
            await web(scope, limited(receive, MAX_WEB_BODY_BYTES), identified(send))

    @property
    def state(self) -> State:
        """The parts, from the end of `start` on."""
        assert self._state is not None
        return self._state

    async def web(self) -> "FastAPI":
        """What answers all other paths."""
        async with self._web_loading:
            if self._web is None:
                web = await asyncio.to_thread(_load_web)
                web.state.parts = self.state
                self._web = web
        return self._web

    @property
    def engine(self) -> EngineConnection | None:
        """The link to the engine in force; None before `start`."""
        return self._engines.link if self._engines is not None else None

    @property
    def engine_process(self) -> EngineProcess | None:
        """The latest engine that this process keeps up itself; None: none is needed, or somebody else keeps it up."""
        kept = self._keeper.processes if isinstance(self._keeper, OwnEngines) else {}
        return next(reversed(kept.values()), None)

    def reload_policy(self) -> None:
        """Read the policy file now, if there is one."""
        if self._reloader is not None:
            self._reloader.look()

    def slow_client(self, phase: Literal["headers", "body", "read"]) -> None:
        """The server cut a connection off (`edge/protocol.py`)."""
        self.state.lifecycle.metrics.slow_client(phase)

    async def start(self) -> None:
        """Everything up but the engine, which comes up beside it. Raises what makes it impossible to serve."""
        settings, policy, stack = self.settings, self.policy, self._stack
        settings.prepare_home()
        pepper = load_pepper(settings.home)
        metrics = Metrics()
        database = connect(settings.database_url, settings.durability)
        stack.callback(database.dispose)
        claim = DatabaseClaim(database, shared=settings.shared)
        claim.take()
        stack.callback(claim.close)
        keeping = asyncio.create_task(claim.keep(), name="database-claim")
        stack.callback(keeping.cancel)
        journal = Journal(settings.journal, sync=to_disk if settings.durability == "full" else None)
        shared = SharedBudgets(connect_budgets(settings.database_url)) if settings.shared else None
        if shared is None:  # alone on this database: what this process inserts is booked nowhere but in its memory
            with database.begin() as connection:
                budget_rows.clear(connection)
        ledger = LedgerStore(
            database,
            journal,
            journals=settings.journal.parent,
            durability=settings.durability,
            booking=shared,
            claim=claim,
        )
        stack.push_async_callback(ledger.stop)
        replayed = ledger.replay()
        if replayed:
            log.warning("ledger.replayed", requests=replayed)
        ledger.start()
        keys = KeyStore(database, pepper)
        self.first_key = make_first_key(keys, settings.home)
        cache: ExactCache = MemoryCache(settings.cache_bytes)
        rates: Rates = LocalRates()
        sessions: Store = MemorySessions()
        link: RedisLink | None = None
        if settings.redis_url:
            # Imported where they are used: without a Redis its client would be 7 MB and a tenth of the start.
            from gateway import redis_link
            from gateway.admission.shared_rates import SharedRates
            from gateway.cache.redis import RedisCache
            from gateway.shared_sessions import SharedSessions

            link = redis_link.RedisLink(settings.redis_url, metrics.redis_up.set)
            stack.push_async_callback(link.close)
            await link.check()
            cache, sessions = RedisCache(link), SharedSessions(link)
            if settings.shared:
                rates = SharedRates(link)
        rates.start()
        stack.push_async_callback(cache.close)
        stack.push_async_callback(rates.close)
        client = HttpClient()
        stack.push_async_callback(client.close)
        if settings.engine is None and self._keeper is None:
            self._keeper = OwnEngines(engine_socket(settings.home))
        keeper = self._keeper if settings.engine is None else None
        engines = self._engines = Engines(keeper, settings.engine, self.policy_folder, metrics)
        stack.push_async_callback(engines.stop)
        await engines.begin(policy)
        world = build_world(policy, client, engines.link, pepper, folder=self.policy_folder)
        engines.put_in_force(world)
        hosts = _hosts(policy)
        if os.environ.get(OTLP_ENDPOINT):
            from gateway.telemetry.traces import Traces  # only where it is used: it takes 15 MB and the extra `otel`

            metrics.traces = traces = Traces(hosts, metrics)
            traces.start()
            stack.push_async_callback(asyncio.to_thread, traces.stop)
        if engines.link.started and engines.link.there and (keeper is None or keeper.shared):
            with contextlib.suppress(TimeoutError):  # a worker that replaces another should not start without
                await asyncio.wait_for(engines.link.ready.wait(), ENGINE_GREETING_S)

        async def spent_since(scope: str, start_ms: int) -> int:
            await ledger.flush()
            return await asyncio.to_thread(report.spent_since, database, scope, start_ms)

        if shared is not None:
            shared.start()
        budgets = shared or Budgets(spent_since)
        metrics.watch_budgets(budgets.all)
        metrics.watch_breakers(
            lambda: {name: breaker.state for name, breaker in self.state.lifecycle.world.breakers.items()}
        )
        learned = Learned(database)
        learned.start()
        stack.push_async_callback(learned.stop)
        metrics.watch_calibration(learned.calibrations)
        lifecycle = Lifecycle(
            world=world,
            keys=keys,
            rates=rates,
            budgets=budgets,
            cache=cache,
            ledger=ledger,
            signals=SignalReader(metrics),
            metrics=metrics,
            pepper=pepper,
            learned=learned,
            sessions=sessions,
        )
        if settings.redis_url:
            from gateway import redis_link, shared_loads

            # A way of its own: no request waits for it, and a late exchange must not leave Redis alone for all else.
            beside = redis_link.RedisLink(settings.redis_url, lambda up: None, timeout_s=shared_loads.PATIENCE_S)
            stack.push_async_callback(beside.close)
            loads = shared_loads.SharedLoads(beside, lambda: lifecycle.world.loads)
            loads.start()
            stack.push_async_callback(loads.stop)
        peers: Peers | None = None
        if settings.peers is not None:
            peers = Peers(settings.peers, settings.worker, lambda: metrics.exposition(settings.worker))
            await peers.start()
            stack.push_async_callback(peers.stop)
        idempotency = IdempotencyStore(database, pepper)
        idempotency.start()
        stack.push_async_callback(idempotency.close)
        stack.push_async_callback(lambda: lifecycle.world.close())
        stack.push_async_callback(lifecycle.shadows.close)
        self._state = state = State(lifecycle, learned, pepper, settings.shared, redis=link, peers=peers)
        self._data_plane = data_plane(lifecycle, idempotency, settings.max_body_bytes)
        polling = asyncio.create_task(_poll_keys(keys), name="key-poll")
        stack.callback(polling.cancel)

        def put_in_force(new: World) -> None:
            hosts.update(_hosts(new.policy))
            lifecycle.put_in_force(new)
            engines.put_in_force(new)

        if self.policy_file is not None:
            self._reloader = state.reloader = PolicyReloader(
                self.policy_file,
                metrics,
                current=lambda: lifecycle.world,
                build=lambda new, engine: build_world(
                    new, client, engine, pepper, before=lifecycle.world, folder=self.policy_folder
                ),
                swap=put_in_force,
                engines=engines,
            )
            self._reloader.start()
            stack.push_async_callback(self._reloader.stop)

    def drain(self) -> None:
        """The end is near: what nobody waits for is not begun any more."""
        if self._state is not None:
            self._state.lifecycle.shadows.drain()

    async def stop(self) -> None:
        await self._stack.aclose()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except Exception as error:
            if not isinstance(error, DatabaseClaimed | JournalError | LedgerUnreachable | MissingSecret | PepperError):
                log.exception("gateway.start_failed")
            await self._stack.aclose()
            self.start_failed = str(error)
            await send({"type": "lifespan.startup.failed"})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})


def _load_web() -> "FastAPI":
    """Blocking: some 0.2 s."""
    from gateway.dashboard.views import mount_dashboard
    from gateway.edge.api import build_web

    web = build_web()
    mount_dashboard(web)
    return web


def _hosts(policy: Policy) -> dict[str, str]:
    return {name: urlsplit(p.base_url).hostname or "" for name, p in policy.providers.items() if p.base_url}


def make_first_key(keys: KeyStore, home: Path) -> str | None:
    """An admin key, also left in the state folder for the command line and the SDK on this machine; None when there are
    keys, be it since a moment ago by another host."""
    if len(keys):
        return None
    try:
        token = keys.create("first", role="admin")
    except IntegrityError:
        keys.reload()
        return None
    fd = os.open(home / "key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(token)
    return token


async def _poll_keys(keys: KeyStore) -> None:
    while True:
        await asyncio.sleep(KEY_POLL_S)
        try:
            await asyncio.to_thread(keys.poll)
        except Exception as error:
            log.warning("keys.reload_failed", error=str(error)[:200])
