"""Which proxy of the environment a connection would go through: as gRPC decides for servers, and urllib for downloads.

What is on this machine's loopback never goes through one. Passwords in a proxy's address are not repeated.
"""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

_GRPC, _GRPC_SKIPS = ("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy")
"""Names of the variables that gRPC reads, lower case only; the first that is set counts."""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or number alone; no name is looked up."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(number, "ipv4_mapped", None) or number).is_loopback


def grpc_proxy(host: str, environ: Mapping[str, str]) -> str:
    """Return what stands between gRPC and a host, such as "http_proxy=http://proxy:3128"; empty if nothing does."""
    name = _first_set(environ, _GRPC)
    if is_loopback(host) or not environ.get(name, "").lower().startswith("http://"):
        return ""
    skips = environ.get(_first_set(environ, _GRPC_SKIPS), "").split(",")
    return "" if any(_covers(skip.strip(), host) for skip in skips) else _named(name, environ)


def why_grpc_proxy(host: str, environ: Mapping[str, str]) -> str:
    """Return the same in a sentence, with what leaves hosts out; empty if there is no proxy in between."""
    named = grpc_proxy(host, environ)
    if not named:
        return ""
    skips = _first_set(environ, _GRPC_SKIPS)
    left_out = f"{skips}={environ[skips]} does not leave out" if skips in environ else "no_proxy is not set for"
    return f"the proxy of {named} is in between ({left_out} {host})"


def download_proxies(urls: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the proxies that urllib puts before any of some addresses; empty if there are none."""
    found = []
    for scheme, host in dict.fromkeys((urlsplit(url).scheme, urlsplit(url).hostname or "") for url in urls):
        names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
        name = next((name for name in names if environ.get(name)), "")
        if name and not is_loopback(host) and not urllib.request.proxy_bypass(host):
            found.append(_named(name, environ))
    return ", ".join(dict.fromkeys(found))


@contextmanager
def loopback_is_direct(urls: Sequence[str]) -> Iterator[None]:
    """Let urllib, in the body, call those of some addresses that are on loopback without a proxy."""
    here = [host for url in urls if is_loopback(host := urlsplit(url).hostname or "")]
    before = os.environ.get("no_proxy")
    if here:
        os.environ["no_proxy"] = ",".join([before or os.environ.get("NO_PROXY", ""), *here]).strip(",")
    try:
        yield
    finally:
        if here:
            os.environ.pop("no_proxy")
            os.environ |= {} if before is None else {"no_proxy": before}


def _first_set(environ: Mapping[str, str], names: Sequence[str]) -> str:
    return next((name for name in names if name in environ), names[-1])


def _named(name: str, environ: Mapping[str, str]) -> str:
    return f"{name}={re.sub(r'//[^/@]*@', '//***@', environ[name])}"


def _covers(entry: str, host: str) -> bool:
    """Whether an entry of no_proxy means a host: as the end of its name, or a range of numbers that it is in."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry)
    except ValueError:  # one of them is a name
        return bool(entry) and host.lower().endswith(entry.lower())
