"""Who looks at the dashboard: a key, pasted once, becomes a signed cookie that names it and says until when.

The cookie holds no secret and no server keeps a list: it is `<key id>.<expiry>.<HMAC under the server's pepper>`. The
key is looked up on every request, so a revoked key ends its sessions.
"""

import hashlib
import hmac

from gateway.admission.keys import KeyStore, Principal

COOKIE = "leadline_session"
LIFETIME_S = 12 * 3600
_PURPOSE = b"leadline dashboard session\n"
"""The pepper signs other things too; what is signed here is good for nothing else."""


def sign(principal: Principal, pepper: bytes, *, now_s: int) -> str:
    payload = f"{principal.key_id}.{now_s + LIFETIME_S}"
    return f"{payload}.{_signature(payload, pepper)}"


def read(cookie: str | None, keys: KeyStore, pepper: bytes, *, now_s: int) -> Principal | None:
    """The key's owner; None for a cookie that is absent, forged, outlived, or of a key that works no more."""
    payload, _, signature = (cookie or "").rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(payload, pepper).encode()):
        return None
    key_id, _, expires_s = payload.partition(".")
    if int(expires_s) <= now_s:
        return None
    return keys.find(key_id)


def _signature(payload: str, pepper: bytes) -> str:
    return hmac.digest(pepper, _PURPOSE + payload.encode(), hashlib.sha256).hex()
