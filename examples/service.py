"""A service with the daemon inside: one trio program serves requests and page faults.

Records lie in guarded memory, and are fetched from a slow store when they are first read.  Clients
ask for a record by its number, or for the statistics.
"""

import json
import struct

import trio

import uffdaemon
from uffdaemon import AsyncSource, CopyFrom, Daemon, FaultAround, Memory

RECORD = 64
RECORDS = 4096
SIZE = RECORD * RECORDS


async def slow_store(offset: int, length: int) -> bytes:
    """Stands for a database or an object store: each request takes a while."""
    await trio.sleep(0.005)
    first, count = offset // RECORD, length // RECORD
    return b"".join(
        struct.pack(f"<Q{RECORD - 8}s", number, f"record {number}".encode())
        for number in range(first, first + count)
    )


class Service:
    """Each request is a line: a record's number, or ``statistics``."""

    def __init__(self, daemon: Daemon, memory: Memory) -> None:
        self._daemon = daemon
        self._memory = memory

    async def reply(self, request: str) -> str:
        if request == "statistics":
            statistics = self._daemon.statistics().as_dict()
            return json.dumps({name: statistics[name] for name in ("faults", "bytes")})
        if not request.isdigit() or int(request) >= RECORDS:
            return f"error: no record {request!r}"
        # In a worker thread, which may wait for its page while the loop fetches it.
        data = await trio.to_thread.run_sync(self._memory.read, int(request) * RECORD, RECORD)
        number, text = struct.unpack(f"<Q{RECORD - 8}s", data)
        return f"{number}: {text.rstrip(bytes(1)).decode()}"

    async def serve_client(self, stream: trio.SocketStream) -> None:
        buffer = b""
        async for received in stream:
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                reply = await self.reply(line.decode(errors="replace").strip())
                await stream.send_all(reply.encode() + b"\n")


async def main() -> None:
    source = AsyncSource(slow_store, SIZE)
    async with trio.open_nursery() as nursery:
        with Memory.map(SIZE) as memory:
            async with uffdaemon.open_daemon() as daemon:
                daemon.guard(memory, FaultAround(CopyFrom(source), pages=4), name="records")
                service = Service(daemon, memory)
                listeners = await nursery.start(trio.serve_tcp, service.serve_client, 0)
                await ask(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def ask(port: int) -> None:
    """A client, so that the example has something to do."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        for request in ("7", "8", "4095", "oops", "statistics"):
            await stream.send_all(request.encode() + b"\n")
            reply = b""
            while not reply.endswith(b"\n"):
                reply += await stream.receive_some()
            print(f"{request} -> {reply.decode()}", end="")


if __name__ == "__main__":
    trio.run(main)
