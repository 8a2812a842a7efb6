"""From data to an answer: templates, assets, and the headers that keep a page from doing anything but being read."""

import hashlib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import Response

from gateway import __version__
from gateway.dashboard import words
from gateway.dashboard.filters import RANGE_NAMES, cursor_text
from gateway.ledger.records import UNFAILED
from routers.units import format_money

if TYPE_CHECKING:
    from jinja2 import Environment

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
PRIVATE = {**SECURITY_HEADERS, "cache-control": "no-store"}
ASSETS = {"style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}


def html(template: str, status: int = 200, **context: Any) -> Response:
    text = _templates().get_template(template).render(context)
    return Response(text, status, headers=PRIVATE, media_type="text/html")


def asset(name: str) -> Response | None:
    if name not in ASSETS:
        return None
    headers = {**SECURITY_HEADERS, "cache-control": "public, max-age=31536000, immutable"}
    return Response(_asset(name), headers=headers, media_type=ASSETS[name])


@cache
def _asset(name: str) -> bytes:
    return resources.files("gateway.dashboard").joinpath("static", name).read_bytes()


def _asset_url(name: str) -> str:
    return f"/dashboard/static/{name}?v={hashlib.sha256(_asset(name)).hexdigest()[:12]}"


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only who opens the dashboard pays for it

    environment = Environment(
        loader=PackageLoader("gateway.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        exact=format_money,
        short_money=words.short_money,
        instant=words.instant,
        clock=words.clock,
        duration=words.duration,
        count=words.count,
        cursor=cursor_text,
    )
    environment.globals.update(asset_url=_asset_url, version=__version__, range_names=RANGE_NAMES, unfailed=UNFAILED)
    return environment
