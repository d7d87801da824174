"""Runs the application until it is told to stop, and then lets running requests finish."""

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from tw_jax.errors import UserError
from tw_jax.serve.app import Service, create_app

CANCEL_TIMEOUT_S = 5  # for answers that are cut off at the end of the drain to be sent
# Longer than clients keep an idle connection (httpx: 5 s): closed at the same moment from both
# sides, a request that was just sent is lost.
KEEP_ALIVE_S = 75
POLL_S = 0.02


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; clients are refused until the server runs.

    Raises:
      UserError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on host={host} port={port}: {error}; choose others (port=0 takes a "
            "free one)"
        ) from error
    return bound


def address(bound: socket.socket) -> str:
    """Where clients find the server, as they write it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn's server, with a bounded drain in place of its own way to stop."""

    def __init__(self, service: Service, on_ready: Callable[[], None]) -> None:
        """Prepares to serve.

        Args:
          service: what is served; its thread is started and closed here.
          on_ready: called once clients are answered.
        """
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CANCEL_TIMEOUT_S,
                ws="none",
            )
        )
        self._service, self._on_ready = service, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def run_until_stopped(self, bound: socket.socket) -> None:
        """Serves until SIGTERM, Ctrl-C, `stop`, or a failure of the engine for good."""
        self._loop = asyncio.get_running_loop()
        self._service.thread.start(self._loop)
        try:
            await self.serve(sockets=[bound])
        finally:
            await asyncio.to_thread(self._service.thread.close)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens for clients."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def stop(self) -> None:
        """Takes no more requests, and ends when the running ones have. From any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_drain)

    def stop_now(self) -> None:
        """Ends at once; on the event loop."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and Ctrl-C stop; a second Ctrl-C does not wait for requests."""
        if self._draining is not None and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        else:
            self.stop()

    def _begin_drain(self) -> None:
        if self._draining is None:
            self._service.is_draining = True
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        thread = self._service.thread
        await self._until_idle(self._service.config.drain_timeout_s)
        thread.cancel_all()
        await self._until_idle(CANCEL_TIMEOUT_S)
        self.should_exit = True

    async def _until_idle(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self._service.thread.outstanding and loop.time() < end:
            await asyncio.sleep(POLL_S)
