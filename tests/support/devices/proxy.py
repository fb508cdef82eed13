"""A TCP proxy to a port of this machine, for tests: slow connections, and connections that break."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Proxy:
    """`delay` seconds each way. The first connection is cut after `cut_up` bytes of the client, or `cut_down` bytes of
    the server.
    """

    target: int  # port
    delay: float = 0.0
    cut_up: int | None = None
    cut_down: int | None = None
    up: int = 0  # bytes of all clients
    down: int = 0  # bytes of the server
    connections: int = 0
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _sockets: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    def cut(self) -> None:
        """Close the present connections at both ends."""
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def run(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [client, server]
                self.connections += 1
                self.run(self._forward, client, server, "up")
                self.run(self._forward, server, client, "down")

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(timeout=10)
        for end in (self.listener, *self._sockets):
            end.close()

    def _forward(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        """Forward bytes until the source ends, or the first connection reaches its limit."""
        limit = getattr(self, f"cut_{way}") if self.connections == 1 else None
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()
        self.run(self._deliver, waiting, sink)
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(content))
                waiting.put((time.monotonic() + self.delay, content))
                if limit is not None and getattr(self, way) >= limit:
                    break
        waiting.put((time.monotonic() + self.delay, b""))
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RDWR)

    def _deliver(self, waiting: queue.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, content = waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not content:
                    break
                sink.sendall(content)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(
    target: int, *, delay: float = 0.0, cut_up: int | None = None, cut_down: int | None = None
) -> Iterator[Proxy]:
    """Run a proxy to a port."""
    running = Proxy(target, delay, cut_up, cut_down)
    running.run(running.accept)
    try:
        yield running
    finally:
        running.close()
