"""Who may open the page of `aprtui serve`: whoever has its address, from its own page alone.

Whoever drives an explorer reads what it shows. On a machine with other users each of them reaches a
port of it, and a site that the user visits may try to, in the same browser.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from aiohttp import web

LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
# A name or an address, and a port; what else a URL may have there is no host.
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]{1,5})?", re.ASCII)
TOKEN_BYTES = 32
PARAMETER = "token"


def make_token() -> str:
    """A token that nobody guesses, fit for an address."""
    return secrets.token_urlsafe(TOKEN_BYTES)


class PageGuard:
    """Refuses requests.

    Args:
        token: What an address needs; None: nothing.
        loopback_only: Whether only the names of this machine are answered to.
    """

    def __init__(self, token: str | None, *, loopback_only: bool) -> None:
        self._token = token
        self._loopback_only = loopback_only
        # Cookies do not know ports: each server has one of its own.
        name = "" if token is None else hashlib.sha256(token.encode()).hexdigest()[:12]
        self._cookie = f"aprtui-{name}"

    def check(self, request: web.Request) -> None:
        """Let a request pass, or not.

        Raises:
            HTTPBadRequest: It does not say properly where it goes.
            HTTPForbidden: It is of another page, or has no token.
        """
        host = _HOST.fullmatch(request.host)
        if host is None:
            raise web.HTTPBadRequest(text="aprtui serve: a malformed host")
        if self._loopback_only and host["name"].lower() not in LOOPBACK_NAMES:
            raise web.HTTPForbidden(text="aprtui serve answers to localhost and 127.0.0.1 only")
        origin = request.headers.get("Origin")
        # Behind a proxy that speaks TLS a page has another scheme than its server.
        if origin is not None and origin not in (f"http://{host[0]}", f"https://{host[0]}"):
            raise web.HTTPForbidden(text="aprtui serve answers to its own page only")
        given = (request.query.get(PARAMETER), request.cookies.get(self._cookie))
        if self._token is not None and not any(map(self._is_token, given)):
            raise web.HTTPForbidden(
                text="aprtui serve: open the address that the command printed, with its token"
            )

    def remember(self, response: web.StreamResponse) -> None:
        """Have the browser that has the page say the token from now on, out of reach of scripts."""
        if self._token is not None:
            response.set_cookie(self._cookie, self._token, httponly=True, samesite="Strict")

    def _is_token(self, given: str | None) -> bool:
        assert self._token is not None
        # In constant time: how long a refusal takes says nothing of the token.
        return given is not None and hmac.compare_digest(
            given.encode(errors="replace"), self._token.encode()
        )
