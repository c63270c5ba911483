"""A server that does nothing but answer, to learn what the load generator itself can do: `python FILE PORT BYTES`.

In: requests with a Content-Length, one at a time on each connection. Out: always the same body of that many bytes.
"""

from __future__ import annotations

import asyncio
import sys


class Answering(asyncio.Protocol):
    """One connection."""

    def __init__(self, answer: bytes) -> None:
        self._answer, self._got = answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to answer."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
        if end and len(body) >= length:
            self._got = b""
            self._transport.write(self._answer)


async def serve(port: int, size_bytes: int) -> None:
    """Answer until the process ends."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {size_bytes}\r\n\r\n"
    answer = head.encode() + b'"' + b"x" * (size_bytes - 2) + b'"'
    server = await asyncio.get_running_loop().create_server(lambda: Answering(answer), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
