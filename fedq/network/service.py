"""The hub behind gRPC: three methods, messages in pieces, certificates checked, in a thread with an event loop.

``Describe`` (a note in, a note out) says what the federation is. ``Follow`` (a note in, a stream of pieces out) is how
a client is told everything; that it is open is how the server knows that the client is there. ``Send`` (a stream of
pieces in, a note out) brings an answer. All carry `fedq.wire` messages as bytes, so there is no generated code.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc

from fedq.errors import FieldError
from fedq.network.certs import Identity, Revoked, client_number
from fedq.network.client_record import ClientRecord, Task
from fedq.network.connection_limit import connection_limit
from fedq.network.hub import Assignment, Hub, Refused
from fedq.network.settings import CHUNK_NBYTES, check_address
from fedq.text import clean
from fedq.waiting import Wait, speaking
from fedq.wire import Assembler, Message, note, read_note, unpack

_log = logging.getLogger(__name__)
T = TypeVar("T")
DESCRIBE, FOLLOW, SEND = (f"/fedq.Federation/{name}" for name in ("Describe", "Follow", "Send"))
SESSION, NUMBER = "fedq-session", "fedq-number"
"""Names of a call's metadata."""
_PIECE_LIMIT = CHUNK_NBYTES + (64 << 10)
_GOODBYE_S = 10.0
_POLL_S = 1.0
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _PIECE_LIMIT),
    ("grpc.max_send_message_length", _PIECE_LIMIT),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
"""Of both sides: no piece is larger than it says, and a peer that has vanished without a word is noticed."""
_SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not half of the clients
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 16),  # of one connection
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.server_handshake_timeout_ms", 10_000),  # of somebody who connects and says nothing
    ("grpc.max_connection_idle_ms", 60_000),  # without a call; a client that is here follows
]


class Service(grpc.GenericRpcHandler):
    """Serves a hub, from `__enter__` to `__exit__`, in a thread of its own.

    Args:
        hub: What is known of every client, and the open round; used in the service's thread alone.
        bind: Host and port; port 0 takes a free one.
        identity: The server's certificate and key; None: plaintext.
        revoked: Certificates that are refused, where there is an identity.
    """

    def __init__(self, hub: Hub, bind: str, identity: Identity | None, revoked: Revoked | None = None) -> None:
        self.hub = hub
        self.bind = bind
        self.identity = identity
        self.revoked = revoked
        self.port = 0
        """The port that is listened on."""
        self._grace_s: float | None = None  # what was said last may still be on its way
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fedq-network", daemon=True)

    def __enter__(self) -> Service:
        self._thread.start()
        try:
            self.call(self._start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call(self._server.stop(grace=self._grace_s))
        finally:
            self._end()

    def call(self, work: Coroutine[Any, Any, T], beat: Callable[[], None] = lambda: None) -> T:
        """Run a coroutine in the service's thread and wait for it, with signs of life."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(timeout=_POLL_S)
            except concurrent.futures.TimeoutError:  # before Python 3.11 not the built-in one
                if future.done():
                    raise
                beat()
            except BaseException:
                future.cancel()
                raise

    def do(self, action: Callable[[], T]) -> T:
        """Call a function in the service's thread and wait for it."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                done.set_result(action())
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result()

    def say_goodbye(self, result: Mapping[str, Any], timeout_s: float, beat: Callable[[], None]) -> None:
        """Tell all clients the result with the final model, and wait until those that are here have it.

        Args:
            result: Result that clients are told, as a note's fields.
            timeout_s: Longest wait in seconds: a model takes its time through a slow link.
            beat: Function that is called as a sign of life while it waits.
        """

        async def goodbye() -> None:
            self.hub.finish(result)
            followers = [follower for record in self.hub.records.values() for follower in record.followers]
            if followers:
                await asyncio.wait(followers, timeout=timeout_s)

        with speaking(Wait(lambda: "clients to take the final model", timeout_s, say=_log.info)):
            self.call(goodbye(), beat)
        self._grace_s = _GOODBYE_S

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a method, as gRPC asks; messages stay bytes."""
        if handler_call_details.method == DESCRIBE:
            return grpc.unary_unary_rpc_method_handler(self._describe)
        if handler_call_details.method == FOLLOW:
            return grpc.unary_stream_rpc_method_handler(self._follow)
        if handler_call_details.method == SEND:
            return grpc.stream_unary_rpc_method_handler(self._send)
        return None

    # ---- the methods, in the event loop ------------------------------------------------------------------------------

    async def _describe(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            record = self.hub.knock(self._number(context))
        except Refused as refusal:
            return await _refuse(context, refusal)
        return bytes(self.hub.description(record).pack())

    async def _follow(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        try:
            number = self._number(context)
            record = self.hub.admit(number, self._heard(number, request), clean(unquote(context.peer())))
        except Refused as refusal:
            return await _refuse(context, refusal)
        follower = asyncio.current_task()
        assert follower is not None
        try:
            with self._following(record, follower):
                await self._tell(record, context)
        except asyncio.CancelledError:
            if follower not in record.why_ended:
                raise
            await _refuse(context, Refused(record.why_ended[follower], is_final=False))
        except Refused as refusal:
            await _refuse(context, refusal)
        finally:
            record.why_ended.pop(follower, None)

    def _heard(self, number: int, request: bytes) -> dict[str, Any]:
        """Return what a greeting says.

        Raises:
            Refused: It is no note.
        """
        try:
            return read_note(unpack(request, self.hub.terms.limits))
        except FieldError as error:
            raise self.hub.misgreeted(self.hub.knock(number), error) from None

    async def _tell(self, record: ClientRecord, context: grpc.aio.ServicerContext) -> None:
        """Tell a client what it is asked, until the end."""
        hub, asked = self.hub, -1
        await self._write(record, context, [hub.welcome(record)])
        while hub.result is None:
            record.news.clear()
            assignment = hub.assignment(record)
            if assignment is not None and assignment.task is not None and assignment.task.sequence != asked:
                self._number(context)  # it may have been revoked since it came
                asked = assignment.task.sequence
                await self._assign(record, context, assignment)
            elif hub.result is None:
                await record.news.wait()
        await self._assign(record, context, hub.farewell(record))

    async def _assign(self, record: ClientRecord, context: grpc.aio.ServicerContext, assignment: Assignment) -> None:
        await self._write(record, context, [*assignment.models, assignment.note])
        self.hub.caught_up(record, assignment.version)

    async def _write(
        self, record: ClientRecord, context: grpc.aio.ServicerContext, messages: Sequence[Message]
    ) -> None:
        """Send messages in pieces, at the client's pace, and note what was sent."""
        done = 0
        try:
            for piece in pieces_of(messages):
                await context.write(piece)
                done += len(piece)
        except BaseException:
            self.hub.cut_short(record, done, "downlink")
            raise
        with_payloads = [message for message in messages if message.layout is not None]
        for message in messages:
            self.hub.sent(record, message, is_newest=message in with_payloads[-1:])

    async def _send(self, pieces: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        metadata = dict(context.invocation_metadata() or ())
        try:
            record = self.hub.record_in_session(self._number(context), str(metadata.get(SESSION, "")))
            self.hub.begins(record)
        except Refused as refusal:
            return await _refuse(context, refusal)
        if record.uploads:
            return await _refuse(context, Refused(f"client {record.number} is sending already", is_final=False))
        upload = asyncio.current_task()
        assert upload is not None
        record.uploads.add(upload)
        try:
            return await self._receive(record, pieces, context)
        finally:
            record.uploads.discard(upload)

    async def _receive(
        self, record: ClientRecord, pieces: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> bytes:
        """Take one message of a client."""
        assembler = Assembler(self.hub.terms.limits)
        task, done = record.task, 0
        try:
            messages: list[Message] = []
            async for piece in pieces:
                done += len(piece)
                messages += assembler.add(piece)
                if len(messages) > 1 or (messages and assembler.pending):
                    raise FieldError("messages", len(messages) + 1, "one for each answer")
            if not messages:
                raise FieldError("message", f"{assembler.pending} bytes", "a whole one")
            self.hub.accept(record, messages[0])
            done = 0
        except FieldError as error:
            self.hub.offend(record, error)
            return await _refuse(context, Refused(str(error)), grpc.StatusCode.INVALID_ARGUMENT)
        except Refused as refusal:
            return await _refuse(context, refusal)
        finally:
            self.hub.cut_short(record, done, "uplink")
        return _ack(task)

    def _number(self, context: grpc.aio.ServicerContext) -> int:
        """Return who calls: by the certificate, or without TLS by what the call says.

        Raises:
            Refused: A certificate of no client, or one that is revoked; or no number.
        """
        if self.identity is None:
            text = str(dict(context.invocation_metadata() or ()).get(NUMBER, ""))
            if not (text.isascii() and text.isdigit()) or len(text) > 9:
                raise Refused(f"{NUMBER}={text!r} is not allowed; allowed: the client's number")
            return int(text)
        names = context.auth_context().get("x509_common_name", [])
        number = client_number(names[0].decode(errors="replace")) if len(names) == 1 else None
        if number is None:
            raise Refused(f"{names!r} is no client's certificate")
        if self.revoked is not None and self.revoked.has(context.auth_context()["x509_pem_cert"][0]):
            raise Refused(f"this certificate of client {number} is revoked")
        return number

    @contextmanager
    def _following(self, record: ClientRecord, follower: asyncio.Task[None]) -> Iterator[None]:
        record.followers.add(follower)
        self.hub.arrived(record)
        try:
            yield
        finally:
            record.followers.discard(follower)
            self.hub.left(record)

    # ---- beginning and end -------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        most = connection_limit(self.hub.terms.num_clients, check_address("bind", self.bind)[0])
        options = [*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", most)]
        self._server = grpc.aio.server(handlers=(self,), options=options)
        try:
            if self.identity is None:
                self.port = self._server.add_insecure_port(self.bind)
            else:
                own = self.identity
                trust = grpc.ssl_server_credentials(
                    ((own.key, own.certificate),), root_certificates=own.authority, require_client_auth=True
                )
                self.port = self._server.add_secure_port(self.bind, trust)
        except RuntimeError as error:
            raise FieldError("bind", self.bind, f"an address of this machine with a free port ({error})") from None
        await self._server.start()

    def _end(self) -> None:
        async def cancel_all() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(timeout=_GOODBYE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def pieces_of(messages: Sequence[Message]) -> Iterator[bytes]:
    """Yield messages one after another in pieces of at most 1 MiB; a small one shares a piece with its neighbours."""
    held = b""
    for message in messages:
        for piece in message.chunks(CHUNK_NBYTES):
            if len(held) + len(piece) <= CHUNK_NBYTES:
                held += piece
                continue
            if held:
                yield held
            held = piece
    if held:
        yield held


def _ack(task: Task | None) -> bytes:
    assert task is not None
    return bytes(note({"kind": "accepted"}, round=task.round, sequence=task.sequence).pack())


async def _refuse(
    context: grpc.aio.ServicerContext, refusal: Refused, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED
) -> Any:
    """End a call with the reason; a client gives up where trying again cannot help."""
    await context.abort(code if refusal.is_final else grpc.StatusCode.FAILED_PRECONDITION, refusal.reason)
