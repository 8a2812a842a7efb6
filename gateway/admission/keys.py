"""API keys: `sk-ll-<public id>-<secret>`. The id finds the row, an HMAC under the server's pepper proves the secret.

Only the HMAC is stored. The comparison takes constant time, and the in-memory table is keyed by the public id and
checked by the full digest, never by a part of the token. A token once proven is recognised by its whole SHA-256 until
the keys change (0.4 µs instead of the HMAC's 1.6); the token itself is not kept.
"""

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import Engine, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from gateway.errors import Forbidden, Unauthenticated
from gateway.ledger.tables import ApiKey, KeyChange
from routers.units import Window

Role = Literal["admin", "user", "reader"]
"""What a key may do: `admin` all; `user` run, and see its own tenant's receipts and spend; `reader` only see them."""
PREFIX = "sk-ll-"
PEPPER_BYTES = 32
RELOAD_PAUSE_S = 0.2
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
"""Of the names of keys, teams and tenants."""
_NAME = re.compile(NAME_PATTERN)


class KeyNameError(ValueError):
    """A key's name, tenant or team cannot be used; the message says why."""


class KeyNameTaken(KeyNameError):
    """A key of that name works."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling."""

    key_id: str
    key_name: str
    tenant: str
    role: Role
    budget_nanousd: int | None = None
    budget_window: Window | None = None
    team: str | None = None

    def must_run(self) -> None:
        """Raises Forbidden for a key that may only look."""
        if self.role == "reader":
            raise Forbidden(
                f"Key {self.key_name} has the role reader: it may list models and see its tenant's receipts and spend, "
                "and run nothing. Use a key with the role user."
            )


class PepperError(RuntimeError):
    """The server's secret is damaged: keys and sessions made under it cannot be checked."""


def load_pepper(home: Path) -> bytes:
    """The server's secret for key hashes, made on first use, readable by its owner alone. Raises PepperError."""
    path = home / "pepper"
    if not path.exists():
        draft = home / f"pepper.{secrets.token_hex(4)}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(PEPPER_BYTES))
            file.flush()
            os.fsync(file.fileno())  # a pepper that power loss emptied would make every key useless
        try:
            os.link(draft, path)  # whole or not at all, and never over one that another process has just made
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    pepper = path.read_bytes()
    if len(pepper) != PEPPER_BYTES:
        raise PepperError(
            f"{path}: holds {len(pepper)} bytes instead of {PEPPER_BYTES}; restore it, or remove it and make new keys"
        )
    return pepper


class KeyStore:
    """All keys, in memory for look-ups, in SQL for good. Changes made here are seen by the next request.

    Each change also counts up one number in SQL, in the same transaction: whoever polls reads that number alone until
    it differs, however many keys there are.
    """

    def __init__(self, engine: Engine, pepper: bytes) -> None:
        self._engine = engine
        self._pepper = pepper
        self._keys: dict[str, tuple[str, Principal]] = {}
        self._proven: dict[bytes, Principal] = {}
        """SHA-256 of a whole token → its owner. A key has one token, so this is never larger than `_keys`."""
        self._change = -1
        self._polled_at = 0.0
        self._looking = asyncio.Lock()
        self._reading = threading.Lock()
        _start_counting(engine)
        self.reload()

    def reload(self) -> None:
        """Read all keys again, whether they have changed or not. One thread at a time: what is read last counts."""
        with self._reading:
            with Session(self._engine) as session:
                change = _last_change(session)  # before the rows: what changes meanwhile is read again next time
                rows = session.exec(select(ApiKey).where(col(ApiKey.revoked_at_ms).is_(None))).all()
            self._keys = {row.id: (row.hash, _principal(row)) for row in rows}
            self._proven = {}
            self._change = change

    def poll(self) -> bool:
        """Read all keys again if one has changed since; says whether that was so. One row of SQL where it was not."""
        with Session(self._engine) as session:
            changed = _last_change(session) != self._change
        if changed:
            self.reload()
        self._polled_at = time.monotonic()
        return changed

    async def recognise(self, token: str) -> Principal:
        """`authenticate`, with a second look at SQL for a key that another process may just have made."""
        try:
            return self.authenticate(token)
        except Unauthenticated:
            async with self._looking:
                polled_at = self._polled_at
                wait = polled_at + RELOAD_PAUSE_S - time.monotonic()
                if wait > 0:  # however many wrong keys come, SQL is asked this often at most
                    await asyncio.sleep(wait)
                if self._polled_at == polled_at:  # nobody else has since; uvloop's sleep may end a little early
                    await asyncio.to_thread(self.poll)
            return self.authenticate(token)

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(self, token: str) -> Principal:
        """Raises Unauthenticated: the message never repeats the token."""
        proven = self._proven
        fingerprint = hashlib.sha256(token.encode()).digest()
        principal = proven.get(fingerprint)
        if principal is None:
            principal = proven[fingerprint] = self._prove(token)
        return principal

    def still(self, principal: Principal) -> Principal:
        """Who was recognised a moment ago, as the key is now. Raises Unauthenticated once it has been revoked."""
        found = self._keys.get(principal.key_id)
        if found is None:
            raise _incorrect()
        return found[1]

    def _prove(self, token: str) -> Principal:
        if not token:
            raise Unauthenticated(f"No API key provided. {_SEND}")
        public_id, _, secret = token.removeprefix(PREFIX).partition("-")
        found = self._keys.get(public_id) if token.startswith(PREFIX) else None
        digest = self._digest(public_id, secret)
        if found is None or not hmac.compare_digest(found[0], digest):
            raise _incorrect()
        return found[1]

    def create(
        self,
        name: str,
        *,
        tenant: str = "default",
        team: str | None = None,
        role: Role = "user",
        budget_nanousd: int | None = None,
        budget_window: Window = "month",
    ) -> str:
        """Make a key and return it: the only time it is seen whole. Raises KeyNameError."""
        for field, value in (("name", name), ("tenant", tenant), ("team", team)):
            if value is not None and not _NAME.fullmatch(value):
                raise KeyNameError(f"{field} {value!r}: use 1 to 64 letters, digits, '.', '_', '@' or '-'")
        if any(principal.key_name == name for _, principal in self._keys.values()):
            raise KeyNameTaken(f"name {name!r}: a key of that name exists; choose another or revoke it first")
        public_id, secret = secrets.token_hex(6), secrets.token_urlsafe(24).replace("-", "x")
        row = ApiKey(
            id=public_id,
            name=name,
            tenant=tenant,
            team=team,
            role=role,
            hash=self._digest(public_id, secret),
            created_at_ms=time.time_ns() // 1_000_000,
            budget_nanousd=budget_nanousd,
            budget_window=budget_window if budget_nanousd is not None else None,
        )
        with Session(self._engine) as session:
            for old in session.exec(select(ApiKey).where(ApiKey.name == name)):
                old.name = f"{name[:51]}#{old.id}"  # a revoked key gives its name back
                session.add(old)
            session.flush()
            session.add(row)
            _count_change(session)
            session.commit()
            self._keys[public_id] = (row.hash, _principal(row))
        return f"{PREFIX}{public_id}-{secret}"

    def revoke(self, key_id: str) -> bool:
        """False when there is no such key."""
        with Session(self._engine) as session:
            row = session.get(ApiKey, key_id)
            if row is None or row.revoked_at_ms is not None:
                return False
            row.revoked_at_ms = time.time_ns() // 1_000_000
            session.add(row)
            _count_change(session)
            session.commit()
        self._keys.pop(key_id, None)
        self._proven = {}
        return True

    def change(
        self,
        key_id: str,
        *,
        role: Role,
        team: str | None,
        budget_nanousd: int | None,
        budget_window: Window | None,
    ) -> Principal | None:
        """Give a key another role, team or budget; None when there is no such key. Raises KeyNameError."""
        if team is not None and not _NAME.fullmatch(team):
            raise KeyNameError(f"team {team!r}: use 1 to 64 letters, digits, '.', '_', '@' or '-'")
        with Session(self._engine) as session:
            row = session.get(ApiKey, key_id)
            if row is None or row.revoked_at_ms is not None:
                return None
            row.role, row.team = role, team
            row.budget_nanousd = budget_nanousd
            row.budget_window = (budget_window or "month") if budget_nanousd is not None else None
            session.add(row)
            _count_change(session)
            session.commit()
            principal = _principal(row)
            self._keys[key_id] = (row.hash, principal)
        self._proven = {}
        return principal

    def find(self, key_id: str) -> Principal | None:
        """The owner of a key that works."""
        found = self._keys.get(key_id)
        return found[1] if found is not None else None

    def all(self) -> list[Principal]:
        return [principal for _, principal in self._keys.values()]

    def _digest(self, public_id: str, secret: str) -> str:
        return hmac.digest(self._pepper, f"{public_id}:{secret}".encode(), hashlib.sha256).hex()


_SEND = (
    "Send one of this gateway's keys (they start with `sk-ll-`) as `Authorization: Bearer …`; `leadline keys create "
    "NAME` makes one."
)


def _incorrect() -> Unauthenticated:
    return Unauthenticated(f"Incorrect API key provided. {_SEND}")


def _start_counting(engine: Engine) -> None:
    with Session(engine) as session:
        if session.exec(select(KeyChange.count)).first() is None:
            session.add(KeyChange(id=1, count=0))
            with contextlib.suppress(IntegrityError):  # another process has just done so
                session.commit()


def _last_change(session: Session) -> int:
    return session.exec(select(KeyChange.count)).one()


def _count_change(session: Session) -> None:
    """Counts up in the transaction of the change itself: nobody sees the one without the other."""
    session.connection().execute(update(KeyChange).values(count=col(KeyChange.count) + 1))


def _principal(row: ApiKey) -> Principal:
    return Principal(
        key_id=row.id,
        key_name=row.name,
        tenant=row.tenant,
        role=row.role,  # type: ignore[arg-type]
        budget_nanousd=row.budget_nanousd,
        budget_window=row.budget_window,  # type: ignore[arg-type]
        team=row.team,
    )
