"""Restrict the viewer: answer only requests to this machine's names, and forbid the page to load other content."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

HEADERS = {
    "Content-Security-Policy": (
        # The digest is that of the style sheet that OpenSeadragon inserts into the page.
        "default-src 'self'; style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The page cannot load content from other servers, and other sites cannot load content from the viewer."""

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::\d+)?")


class Guard:
    """Answers only requests whose host is this server, which prevents DNS rebinding by web sites.

    Args:
        app: The protected application.
        hosts: Host names and addresses to accept.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        named = Headers(scope=scope).getlist("host")
        match = _HOST.fullmatch(named[0]) if len(named) == 1 else None
        if match is None or (match[1] or match[2]).lower() not in self._hosts:
            refusal = JSONResponse(
                {"error": "This viewer answers only at its own address.", "remedy": "Use the address it printed."},
                status_code=403,
            )
            await refusal(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)
