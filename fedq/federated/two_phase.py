"""Rounds whose server is spread over the ranks: each owns some tensors, and no rank receives every client's update.

A rank sends each owner the owner's share of its clients' messages; the owner decodes, averages and steps, and sends its
share of the coded change to all. Payloads, averages and steps are those of single tensors, so the bytes of messages and
model are those of a server on rank 0. For W ranks, updates of U bytes from K clients and changes of D bytes, a rank
that owns 1/W of the bytes receives ``(K - K/W) · U/W + (W-1)/W · D`` a round, where rank 0 alone would get
``(K - K/W) · U``. A tensor is never cut, so the largest one bounds the balance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedq.collectives import Transport
from fedq.federated.accounting import Sections, framing, payload_parts, span_sections
from fedq.federated.aggregate import NO_OTHERS
from fedq.federated.delivery import Ranked
from fedq.federated.exchange import Exchange
from fedq.federated.training import RoundContext
from fedq.layout import Layout, Span
from fedq.ledger import NO_CLIENT, Ledger
from fedq.wire import HEADER_NBYTES, Frame, body_nbytes, join_body, split_body

_SIZE_NBYTES = 8


def deal(layout: Layout, world_size: int) -> list[list[int]]:
    """Return the spans, by number, that each rank owns: the heaviest first, each where there is the least so far.

    No rank owns more than 4/3 of the least possible maximum (Graham 1969). Rank 0, which evaluates, books and writes
    besides, gets the lightest share.
    """
    weights = _weights(layout)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for number in sorted(range(len(weights)), key=lambda number: -weights[number]):
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += weights[number]
    return [sorted(shares[i]) for i in sorted(range(world_size), key=lambda i: loads[i])]


def _weights(layout: Layout) -> list[int]:
    """Return the bytes of each span's payload, or of its values in float32 where that size is not fixed."""
    return [s.codec.payload_nbytes(s.shape) if s.codec.fixed_size else 4 * s.numel for s in layout.spans]


class TwoPhase(Exchange):
    """Every rank has the server of the tensors that it owns.

    Args:
        transport: What moves buffers between ranks.
        ledger: Ledger in which rank 0 books bytes.
        layout: Layout of the updates, whose bytes decide who owns what.
    """

    is_spread = True

    def __init__(self, transport: Transport, ledger: Ledger, layout: Layout) -> None:
        super().__init__(transport, ledger)
        self.owned = deal(layout, transport.world_size)
        self.note = self._balance(_weights(layout))
        self._num_params = [sum(layout.spans[n].role != "stats" for n in numbers) for numbers in self.owned]
        self._parts: dict[int, list[Layout]] = {}
        self._round = 0

    def _balance(self, weights: Sequence[int]) -> str:
        """Return what a user should know of the shares."""
        loads = sorted(sum(weights[n] for n in numbers) for numbers in self.owned)
        smallest, largest = (100 * load / max(1, sum(weights)) for load in (loads[0], loads[-1]))
        shares = f"{smallest:.0f} % to {largest:.0f} % of an update each ({100 / len(loads):.0f} % would be even)"
        return f"aggregate two_phase: {len(loads)} ranks average {shares}"

    @property
    def serves(self) -> bool:
        """Whether this rank has a server: always, if only of nothing where there are more ranks than tensors."""
        return True

    def parts(self, layout: Layout) -> list[Layout]:
        """Return each rank's part of a layout of the same model."""
        if layout.hash not in self._parts:
            self._parts[layout.hash] = [layout.part(numbers) for numbers in self.owned]
        return self._parts[layout.hash]

    def part(self, layout: Layout) -> Layout:
        """Return what this rank owns of a layout of the same model."""
        return self.parts(layout)[self.transport.rank]

    # ---- the first leg -------------------------------------------------------------------------------------------

    def collect(
        self,
        frames: Sequence[Frame],
        counts: Sequence[int],
        layout: Layout,
        round: int,
        others: Mapping[int, Layout] = NO_OTHERS,
    ) -> Ranked:
        """Send every owner its share of each message, headers before bodies; return the shares that came."""
        assert not others, "shares of messages are cut by one layout"
        self._round = round
        table_nbytes = _table_nbytes(layout)
        dealt = [self._deal_out(frame, layout) for frame in frames]
        shares = [[share[owner] for share in dealt] for owner in range(len(counts))]
        heads = [[frame.header() for frame in share] for share in shares]
        heads[0] += [_section_table(layout, frame) for frame in frames]
        came = self._exchange(heads, [(HEADER_NBYTES + table_nbytes * self._is_root) * n for n in counts])
        headers = [head[: HEADER_NBYTES * n].view(n, HEADER_NBYTES) for head, n in zip(came, counts, strict=True)]
        sizes = [[body_nbytes(header) for header in of_rank] for of_rank in headers]
        bodies = self._exchange([[f.body for f in share] for share in shares], [sum(of_rank) for of_rank in sizes])
        ranked = [
            (sender, Frame.of(header, body))
            for sender, of_rank in enumerate(headers)
            for header, body in zip(of_rank, bodies[sender].split(sizes[sender]), strict=True)
        ]
        if self._is_root:
            tables = [head[HEADER_NBYTES * n :].view(n, table_nbytes) for head, n in zip(came, counts, strict=True)]
            self._book_uplink(ranked, torch.cat(tables), layout)
            self._book_framing("uplink", "sizes", table_nbytes * sum(counts[1:]))
        return sorted(ranked, key=_client)

    def _deal_out(self, frame: Frame, layout: Layout) -> list[Frame]:
        """Return each owner's share of a message; the words of a failure are for rank 0."""
        if not frame.kind.has_payloads:
            return [frame, *[replace(frame, body=frame.body[:0])] * (len(self.owned) - 1)]
        datas = split_body(layout, frame.body)
        return [replace(frame, body=join_body(p, [datas[n] for n in p.numbers])) for p in self.parts(layout)]

    def _exchange(self, sends: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
        """Send every rank some uint8 buffers as one."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.transport.device)
        joined = [torch.cat([empty, *(buffer.to(empty.device) for buffer in buffers)]) for buffers in sends]
        return self.transport.exchange(joined, sizes)

    def _tell_all(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Send every rank the same uint8 buffer."""
        return self.transport.exchange([own.to(self.transport.device)] * len(sizes), sizes)

    # ---- what concerns whole updates -----------------------------------------------------------------------------

    def of_all_params(self, rows: Tensor) -> Tensor:
        """Return the rows of all owners' parameters, by owner."""
        columns = rows.shape[1]
        own = rows.contiguous().view(-1).view(torch.uint8)
        sizes = [rows.element_size() * columns * num for num in self._num_params]
        received = self._tell_all(own, sizes)
        self._book_framing("peer", "norms", sum(sizes) * (len(sizes) - 1))
        return torch.cat([buffer.cpu().view(rows.dtype).view(-1, columns) for buffer in received])

    def everywhere(self, holds: Tensor) -> Tensor:
        """Return where something holds for every owner."""
        shared, moved = self.transport.all_gather(holds.to(torch.uint8))
        self._book_framing("peer", "finite", moved.payload)
        return shared.bool().all(dim=0)

    # ---- the second leg ------------------------------------------------------------------------------------------

    def spread(self, change: Frame | None, layout: Layout, context: RoundContext) -> Frame | None:
        """Send this rank's part of the change to all, and put all parts together; all know when there is none."""
        if change is None:
            return None
        parts = self.parts(layout)
        bodies = self._tell_all(change.body, self._change_sizes(parts, change.body))
        datas: dict[int, Tensor] = {}
        for part, body in zip(parts, bodies, strict=True):
            datas |= zip(part.numbers, split_body(part, body), strict=True)
        in_order = [datas[number] for number in layout.numbers]
        whole = replace(change, body=join_body(layout, in_order))
        if self._is_root:
            payloads = list(zip(layout.spans, span_sections(layout, in_order), strict=True))
            rows = payload_parts(payloads, whole.body.numel())  # no header: all know what it would say
            self._book(context.round, NO_CLIENT, "downlink", rows, wire_times=len(parts) - 1)
        return whole

    def _change_sizes(self, parts: Sequence[Layout], own: Tensor) -> list[int]:
        fixed = [part.fixed_nbytes for part in parts]
        sizes = [nbytes for nbytes in fixed if nbytes is not None]
        if len(sizes) == len(parts):
            return sizes
        shared, moved = self.transport.all_gather(torch.tensor([own.numel()]))
        self._book_framing("downlink", "sizes", moved.payload)
        return shared.view(-1).tolist()

    # ---- what is booked ------------------------------------------------------------------------------------------

    @property
    def _is_root(self) -> bool:
        return self.transport.rank == 0

    def _book_uplink(self, ranked: Ranked, tables: Tensor, layout: Layout) -> None:
        """Book each client's message as the protocol counts it, and what of it crossed ranks on its way to the owners.

        Args:
            ranked: Every message's share for rank 0.
            tables: `_section_table` of each message.
            layout: Layout of the updates.
        """
        for (rank, frame), table in sorted(zip(ranked, tables, strict=True), key=lambda row: row[0][1].client):
            payloads: list[tuple[Span, Sections]] = []
            body, crossed = frame.body.numel(), frame.body.numel() * (rank != 0)
            away = payloads
            if frame.kind.has_payloads:
                payloads = list(zip(layout.spans, _sections(layout, table), strict=True))
                away = [payloads[n] for owner, numbers in enumerate(self.owned) if owner != rank for n in numbers]
                body, crossed = _body_nbytes(payloads), _body_nbytes(away)
            whole = payload_parts(payloads, HEADER_NBYTES + body)
            moved = payload_parts(away, HEADER_NBYTES * (len(self.owned) - 1) + crossed)
            self._book(self._round, frame.client, "uplink", whole, payload_times=1, wire_times=0)
            self._book(self._round, frame.client, "uplink", moved, wire_times=1)

    def _book_framing(self, direction: str, name: str, nbytes: int) -> None:
        if nbytes:
            self._book(self._round, NO_CLIENT, direction, framing(name, nbytes), wire_times=1)


def _client(pair: tuple[int, Frame]) -> int:
    return pair[1].client


# ---- sizes that only the sender knows -------------------------------------------------------------------------------

_COLUMNS = ("codes", "scales", "indices")


def _table_nbytes(layout: Layout) -> int:
    """Return the bytes of a message's `_section_table`; 0 if all payloads have fixed sizes."""
    return _SIZE_NBYTES * len(_COLUMNS) * sum(not span.codec.fixed_size for span in layout.spans)


def _section_table(layout: Layout, frame: Frame) -> Tensor:
    """Return what rank 0 must be told to book a message: the sections of payloads without a fixed size.

    Returns:
        A uint8 buffer: an int64 for each of `_COLUMNS` of each such span; zeros if there are no payloads.
    """
    if not frame.kind.has_payloads:
        return torch.zeros(_table_nbytes(layout), dtype=torch.uint8)
    sections = span_sections(layout, split_body(layout, frame.body))
    known = [s for s, span in zip(sections, layout.spans, strict=True) if not span.codec.fixed_size]
    rows = [[of_span.get(name, 0) for name in _COLUMNS] for of_span in known]
    return torch.tensor(rows, dtype=torch.int64).view(-1).view(torch.uint8)


def _sections(layout: Layout, table: Tensor) -> list[Sections]:
    """Return the sections of every span of a message: by its codec, or by the table that came with it."""
    rows = iter(table.cpu().clone().view(torch.int64).view(-1, len(_COLUMNS)).tolist())
    result: list[Sections] = []
    for span in layout.spans:
        if not span.codec.fixed_size:
            result.append(dict(zip(_COLUMNS, next(rows), strict=True)))
        elif span.role == "coded":
            result.append(span.codec.section_nbytes(span.shape))
        else:
            result.append({span.role: span.codec.payload_nbytes(span.shape)})
    return result


def _body_nbytes(payloads: Sequence[tuple[Span, Sections]]) -> int:
    """Return what `join_body` makes of payloads with these sections."""
    return sum(sum(sections.values()) + _SIZE_NBYTES * (not span.codec.fixed_size) for span, sections in payloads)
