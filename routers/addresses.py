"""The address of a provider, read in one way only: what two URL parsers may take differently is refused.

A private or loopback address is fine, as model servers live there; a link-local one, where clouds keep the credentials
of their machines, is not. Nothing is resolved here.
"""

import ipaddress
import re
from urllib.parse import urlsplit

from routers.units import UnitError

FIX = "write the server's address, such as https://api.openai.com/v1"
_SAFE = re.compile(
    r"https?://(\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|[A-Za-z0-9][A-Za-z0-9.-]*)(:[0-9]+)?(/[A-Za-z0-9._~!$&'()*+,=:@%-]*)*\Z"
)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_METADATA_HOSTS = frozenset({"metadata", "metadata.google.internal", "instance-data", "metadata.tencentyun.com"})
_METADATA_ADDRESSES = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "192.0.0.192", "fd00:ec2::254")))


def check_base_url(text: str) -> str:
    """The address without trailing slashes. Raises UnitError."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UnitError("not an address", FIX) from None
    if parts.scheme not in ("http", "https") or not host:
        raise UnitError("not an http or https address with a host", FIX)
    if "@" in parts.netloc:
        raise UnitError("an address must not carry a user or a password", "give the key in `api_key: env:NAME`")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise UnitError("an address must not carry a query or a fragment", "end the address at its path, such as /v1")
    if not host.isascii():
        raise UnitError(
            "a host with letters beyond ASCII", "write it in its ASCII form, such as xn--mnchen-3ya.example"
        )
    if not _SAFE.match(text) or port == 0:
        raise UnitError("not an http or https address with a host", FIX)
    if any(segment.lower().replace("%2e", ".") in (".", "..") for segment in parts.path.split("/")):
        raise UnitError("an address must not climb with `.` or `..`", "write the path itself, such as /v1")
    if "%2f" in parts.path.lower() or "%5c" in parts.path.lower() or "%00" in parts.path:
        raise UnitError("an address must not hide slashes or zero bytes", "write the path itself, such as /v1")
    _check_host(host)
    return text.rstrip("/")


def _check_host(host: str) -> None:
    if host in _METADATA_HOSTS:
        raise UnitError("a cloud's metadata service, which serves no models", FIX)
    if ":" in host:
        try:
            _check_address(ipaddress.IPv6Address(host))
        except ipaddress.AddressValueError:
            raise UnitError("not an IPv6 address", FIX) from None
        return
    labels = host.split(".")
    if labels[-1].isdigit() or re.match(r"0x[0-9a-f]*\Z", labels[-1]):
        try:  # four decimal numbers, and nothing that C libraries also take: 127.1, 0x7f.1, 2130706433, 0177.0.0.1
            _check_address(ipaddress.IPv4Address(host))
        except ipaddress.AddressValueError:
            raise UnitError("not an IPv4 address in its one plain form", "write it as in 10.0.0.7") from None
        return
    if len(host) > 253 or not all(map(_LABEL.match, labels)):
        raise UnitError("not a host name", FIX)


def _check_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        nat64 = address in ipaddress.IPv6Network("64:ff9b::/96")
        if inner or nat64 or (address in ipaddress.IPv6Network("::/96") and int(address) > 1):
            raise UnitError("an IPv4 address inside an IPv6 one", "write the IPv4 address itself")
        if address.is_site_local:
            raise UnitError("a site-local address, which is no longer used", FIX)
    if address.is_link_local or address in _METADATA_ADDRESSES:
        raise UnitError("a link-local or metadata address, which serves no models", FIX)
    if address.is_multicast or address.is_unspecified or address == ipaddress.ip_address("255.255.255.255"):
        raise UnitError("an address of no one server", FIX)
