"""A client's connection: the calls, what their failures mean, and how long to wait before the next try."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from fedq.errors import FieldError
from fedq.network.certs import Identity
from fedq.network.service import CHANNEL_OPTIONS, DESCRIBE, FOLLOW, NUMBER, SEND, SESSION
from fedq.network.settings import CHUNK_NBYTES, check_address
from fedq.proxies import why_grpc_proxy
from fedq.text import clean
from fedq.waiting import Say, Wait, to_stderr
from fedq.wire import Assembler, Limits, Message, note, read_note, unpack

_FIRST_S, _LONGEST_S = 0.2, 15.0
_FINAL = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)


class NotWanted(Exception):
    """An answer that the server did not take; the reason is its."""


class Lost(Exception):
    """The connection is gone, or was never there."""


class Backoff:
    """Waits twice as long each time, up to a limit, with a random part so that clients do not come back in step.

    Args:
        connection: The connection whose server is waited for.
        give_up_after: Seconds without success after which there are no more tries.
        say: Function that takes a line: who is waited for, how long still, and what may be in the way.
    """

    def __init__(self, connection: Connection, give_up_after: float, say: Say = to_stderr) -> None:
        self.connection = connection
        self.give_up_after = give_up_after
        self.say = say
        self.succeed()

    def succeed(self) -> None:
        """Start over."""
        self._waiting: Wait | None = None
        self._reason = self.connection.where
        self._plan(_FIRST_S)

    def begin(self, first_s: float | None = None) -> Wait:
        """Return the wait for the server, from now on if there was none."""
        if self._waiting is None:
            whom = lambda: f"the server ({self._reason})"  # noqa: E731
            self._waiting = Wait(whom, self.give_up_after, hints=self.connection.hints, say=self.say, first_s=first_s)
        return self._waiting

    def wait(self, reason: str) -> None:
        """Wait for `next_s` seconds; the first time, after a success, this is said at once.

        Raises:
            FieldError: There was no success for too long.
        """
        self._reason = reason
        waiting = self.begin(first_s=0.0)
        if not waiting.left_s:
            allowed = f"a server that answers within {self.give_up_after:g} s"
            raise FieldError("connect", reason, "; ".join([allowed, *self.connection.hints]))
        waiting.look()
        time.sleep(min(self.next_s, waiting.left_s))
        self._plan(min(_LONGEST_S, 2 * self._usual_s))

    def _plan(self, seconds: float) -> None:
        self._usual_s = seconds
        self.next_s = seconds * random.uniform(0.5, 1.5)


class Connection:
    """Calls one server.

    Args:
        address: Host and port of the server.
        identity: This client's certificate and key; None: plaintext.
        number: This client's number; in plaintext the server believes it.
        server_name: Name in the server's certificate, if it is not the host.
        limits: Largest sizes that a message of the server may have.
    """

    def __init__(
        self,
        address: str,
        identity: Identity | None,
        number: int,
        *,
        server_name: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.address = address
        host = check_address("connect", address)[0]
        self.where = f"{address}, {'without' if identity is None else 'by'} TLS"
        """The address, and how it is called, for a person."""
        self.hints = tuple(filter(None, [why_grpc_proxy(host, os.environ)]))
        """Lines on what in the environment stands in between, such as a proxy."""
        self.limits = limits or Limits()
        self.received = self.sent = 0
        """Bytes of messages so far."""
        # Several clients in one process each have a connection of their own.
        options: list[tuple[str, Any]] = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        options.append(("grpc.enable_http_proxy", int(bool(self.hints))))  # gRPC would ask one for this machine, too
        if server_name is not None:
            options.append(("grpc.ssl_target_name_override", server_name))
        if identity is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            trust = grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)
            self._channel = grpc.secure_channel(address, trust, options)
        self._metadata = ((NUMBER, str(number)),)
        self._session = ""
        self._describe = self._channel.unary_unary(DESCRIBE)
        self._follow = self._channel.unary_stream(FOLLOW)
        self._send = self._channel.stream_unary(SEND)
        self._send_piece = self._channel.unary_unary(SEND)  # the same to a server, and no thread here that feeds it

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def describe(self, timeout: float = 30.0) -> dict[str, Any]:
        """Return what the server says of the federation, within so many seconds.

        Raises:
            FieldError: It refuses this client.
            Lost: It cannot be reached.
        """
        request = bytes(note({"kind": "describe"}).pack())
        try:
            return read_note(unpack(self._describe(request, metadata=self._metadata, timeout=timeout), self.limits))
        except grpc.RpcError as error:
            raise self._meaning(error) from None

    def follow(self, hello: Mapping[str, Any]) -> Iterator[Message]:
        """Yield the server's messages, until it has said its last.

        Raises:
            FieldError: It refuses this client, or says what it may not.
            Lost: The connection is gone.
        """
        assembler = Assembler(self.limits)
        call = self._follow(bytes(note(hello).pack()), metadata=self._metadata)
        try:
            for piece in call:
                for message in assembler.add(piece):
                    self.received += message.nbytes
                    yield message
        except grpc.RpcError as error:
            raise self._meaning(error) from None
        finally:
            call.cancel()

    def opened(self, session: str) -> None:
        """Note the session that answers belong to."""
        self._session = session

    def send(self, message: Message, timeout: float) -> None:
        """Send an answer in pieces, and wait until it was taken.

        Raises:
            NotWanted: The round is over, or the server says what is wrong with it.
            FieldError: The server refuses this client.
            Lost: The connection is gone.
        """
        over = threading.Event()
        metadata = (*self._metadata, (SESSION, self._session))

        def pieces() -> Iterator[bytes]:
            for piece in message.chunks(CHUNK_NBYTES):
                if over.is_set():
                    return
                self.sent += len(piece)
                yield piece

        try:
            if message.nbytes > CHUNK_NBYTES:
                self._send(pieces(), metadata=metadata, timeout=timeout)
            else:
                (piece,) = pieces()
                self._send_piece(piece, metadata=metadata, timeout=timeout)
        except grpc.RpcError as error:
            over.set()
            code = error.code()
            if code in (
                grpc.StatusCode.FAILED_PRECONDITION,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.CANCELLED,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            ):
                raise NotWanted(clean(error.details() or code.name)) from None
            raise self._meaning(error) from None

    def _meaning(self, error: grpc.RpcError) -> Exception:
        """Return what a failed call means for this client."""
        details = clean((error.details() or "").partition("\n===")[0], 2048)  # gRPC may say where in its source it was
        code = error.code()
        if code in _FINAL:
            allowed = f"a server that takes this client; it says: {details}"
            return FieldError("connect", self.address, "; ".join([allowed, *self.hints]))
        if "CERTIFICATE_VERIFY_FAILED" in details or "Peer name" in details:
            return FieldError("certs", self.address, f"a server that the authority in ca.pem has signed; {details}")
        if code == grpc.StatusCode.UNAVAILABLE:
            details = details.partition("; last error")[2].strip(": ") or details
        return Lost(f"{self.where}: {details or code.name.lower()}")
