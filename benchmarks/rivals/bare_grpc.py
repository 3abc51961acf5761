"""The same bytes down and up on gRPC with mutual TLS, and nothing else: what the exchange of a round costs at least.

    python benchmarks/rivals/bare_grpc.py --certs DIR/server --bind HOST:PORT --clients 2 --nbytes N --report FILE
    python benchmarks/rivals/bare_grpc.py --certs DIR/client-0 --connect HOST:PORT --nbytes N

No checksum, no decoding, no average. A round is over when the last byte of the last client has arrived; a message is
sent whole (``--piece 0``) or in pieces. ``DIR`` is made by `fedq certs`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

METHOD = "/bare.Exchange/Run"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
Write = Callable[[bytes], Awaitable[None]]
Read = Callable[[], Awaitable[Any]]


async def send(write: Write, data: bytes, piece: int) -> None:
    for start in range(0, len(data), piece or len(data)):
        await write(data[start : start + piece] if piece else data)


async def receive(read: Read, nbytes: int) -> bool:
    """Take so many bytes; say whether they came."""
    while nbytes > 0:
        data = await read()
        if data is grpc.aio.EOF:
            return False
        nbytes -= len(data)
    return True


class Server(grpc.GenericRpcHandler):
    """Sends to all clients and hears all, round after round.

    Args:
        num_clients: For whom it waits.
        data: Bytes of a message.
        piece: Bytes of its pieces; 0: whole.
    """

    def __init__(self, num_clients: int, data: bytes, piece: int) -> None:
        self.num_clients, self.data, self.piece = num_clients, data, piece
        self.contexts: list[grpc.aio.ServicerContext] = []
        self.all_here, self.done = asyncio.Event(), asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return grpc.stream_stream_rpc_method_handler(self._follow)

    async def _follow(self, requests: Any, context: grpc.aio.ServicerContext) -> None:
        self.contexts.append(context)
        if len(self.contexts) == self.num_clients:
            self.all_here.set()
        await self.done.wait()

    async def _exchange(self, context: grpc.aio.ServicerContext) -> None:
        await send(context.write, self.data, self.piece)
        if not await receive(context.read, len(self.data)):
            raise ConnectionError("a client is gone")

    async def run(self, rounds: int) -> list[float]:
        """Return the seconds of each round."""
        await self.all_here.wait()
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            await asyncio.gather(*(self._exchange(context) for context in self.contexts))
            seconds.append(time.perf_counter() - begin)
        self.done.set()
        return seconds


async def serve(args: argparse.Namespace, key: bytes, certificate: bytes, authority: bytes) -> None:
    handler = Server(args.clients, os.urandom(args.nbytes), args.piece)
    server = grpc.aio.server(handlers=(handler,), options=OPTIONS)
    trust = grpc.ssl_server_credentials(((key, certificate),), root_certificates=authority, require_client_auth=True)
    server.add_secure_port(args.bind, trust)
    await server.start()
    args.report.write_text(json.dumps(await handler.run(args.rounds)))
    await server.stop(grace=1)


async def take_part(args: argparse.Namespace, key: bytes, certificate: bytes, authority: bytes) -> None:
    data = os.urandom(args.nbytes)
    trust = grpc.ssl_channel_credentials(authority, key, certificate)
    async with grpc.aio.secure_channel(args.connect, trust, OPTIONS) as channel:
        call = channel.stream_stream(METHOD)(wait_for_ready=True)
        while await receive(call.read, len(data)):
            await send(call.write, data, args.piece)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--certs", type=Path, required=True)
    parser.add_argument("--bind")
    parser.add_argument("--connect")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nbytes", type=int, required=True)
    parser.add_argument("--piece", type=int, default=0, help="bytes; 0 sends a message whole")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    pems = [(args.certs / name).read_bytes() for name in ("key.pem", "cert.pem", "ca.pem")]
    asyncio.run(serve(args, *pems) if args.bind else take_part(args, *pems))


if __name__ == "__main__":
    main()
