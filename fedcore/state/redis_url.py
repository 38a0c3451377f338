"""Where in Redis something is kept: one form of URL for ledgers and for gateways' stores."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlencode, urlsplit

from fedcore.errors import Refused

__all__ = ["parse_redis_url"]

_OPTIONS = ("population", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "db")


def parse_redis_url(url: str) -> tuple[str, str, str]:
    """Population, what may be shown of the URL, and the URL for the client.

    Raises:
        Refused: it is not understood. The line holds neither user nor password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if "@" in parts.query or "@" in parts.fragment or ("@" in parts.path and parts.scheme != "unix"):
            raise ValueError  # a password that is not percent-encoded ends what names the host
    except ValueError:
        raise Refused("the URL of a store cannot be read; one in Redis looks like redis://HOST:PORT/DB?population=NAME") from None
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise Refused(f"a store is a path or a URL redis://, rediss:// or unix://, not {parts.scheme}://")
    shown = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
    options = parse_qs(parts.query, keep_blank_values=True)
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise Refused(f"{shown}: unknown option {', '.join(unknown)}; allowed: {', '.join(_OPTIONS)}")
    populations = options.pop("population", [])
    if len(populations) != 1 or not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", populations[0]):
        raise Refused(f"{shown}: needs ?population=NAME, letters, digits, dot, dash and underscore")
    query = urlencode({name: values[-1] for name, values in options.items()})
    return populations[0], shown, f"{parts.scheme}://{parts.netloc}{parts.path}{f'?{query}' if query else ''}"
