"""Run the viewer's web server on loopback.

Starlette and uvicorn (dependencies of MLflow) handle malformed requests, limit the reading threads to 40 whatever the
number of waiting requests, and shut down cleanly. The standard library's server does none of these.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable

import uvicorn
from starlette.applications import Starlette

from cfusion.errors import ConfigError
from cfusion.interruption import handling
from cfusion.view.api import Viewer, routes
from cfusion.view.guard import LOOPBACK, Guard

logger = logging.getLogger(__name__)

BACKLOG = 512
"""Maximum number of connections that wait to be accepted."""


def make_app(viewer: Viewer, host: str = "127.0.0.1") -> Guard:
    """Build the ASGI application of a viewer.

    Args:
        viewer: What to show.
        host: Host name or address to accept, in addition to those of loopback.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        viewer.slides.start_probe()
        yield
        viewer.slides.close()

    return Guard(routes(viewer, lifespan), {*LOOPBACK, host})


def make_server(viewer: Viewer, host: str = "127.0.0.1") -> uvicorn.Server:
    """Build a server of `make_app`; the socket is passed when it runs."""
    config = uvicorn.Config(
        make_app(viewer, host), log_level="warning", access_log=False, server_header=False, http="h11", ws="none",
        backlog=BACKLOG, timeout_graceful_shutdown=3,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(viewer: Viewer, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serve a viewer until SIGINT or SIGTERM.

    Args:
        viewer: What to show.
        host: Name or address to listen on.
        port: Port; 0: any free port.
        on_start: Called with the address once connections are accepted.

    Raises:
        ConfigError: The port is in use or not allowed, or the host is not an address of this machine.
    """
    with listen(host, port) as listener:
        address, bound = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        server = make_server(viewer, host)

        def stop(_number: int) -> None:
            server.should_exit = True

        with handling((signal.SIGINT, signal.SIGTERM), stop):
            on_start(f"http://{shown}:{bound}/")
            # When uvicorn has shut down, it raises the signal again; `stop` handles that one as well.
            server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket at `host` and `port`.

    Raises:
        ConfigError: The address cannot be bound, or `host` means every address of the machine.
    """
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            raise ConfigError(
                f"--host {host}: would expose the slides on every network of this machine.",
                "Give one address, or keep 127.0.0.1 and use `ssh -L`.", topic="viewer",
            )  # fmt: skip
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"--host {host}: is not a valid address ({error}).", "Use 127.0.0.1.", topic="viewer"
        ) from error
    family, kind, protocol, _, address = found
    if not ipaddress.ip_address(address[0]).is_loopback:
        logger.warning("%s is not loopback: everyone who can reach it can see the slides", address[0])
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port}: is in use by another program.", "Use another, or 0 for any free port.", topic="viewer"
            ) from error
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error}).",
            "Use 127.0.0.1 and a port above 1023, or 0 for any free port.", topic="viewer",
        ) from error  # fmt: skip
    return listener
