"""Flower without its engine: nodes with a client app, and a grid that takes messages through Flower's own bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedq.wire import Message as WireMessage
from fedq.wire import unpack

RUN = 7
WIRE = "fedq.wire"


@dataclass
class Travelled:
    """A message as it went over the wire.

    Args:
        node: At the other end from the server.
        way: ``down`` or ``up``.
        nbytes: All of Flower's serialized objects.
        message: A copy of it.
    """

    node: int
    way: str
    nbytes: int
    message: Message

    @property
    def packed(self) -> WireMessage | None:
        """The first of fedq's messages in it, if any."""
        found = [r[WIRE] for r in self.message.content.array_records.values() if WIRE in r]
        return unpack(found[0].data) if found else None

    @property
    def is_packed(self) -> bool:
        """Whether it carries fedq's messages."""
        return any(WIRE in record for record in self.message.content.array_records.values())


@dataclass
class Node:
    """A client: its app, and what Flower tells it."""

    app: ClientApp
    context: Context
    wrong: Callable[[Message], Message | None] | None = None
    """Called with a message instead of the app, which runs if this returns None."""


@dataclass
class Fleet(Grid):
    """A grid over nodes in this process."""

    nodes: dict[int, Node]
    travelled: list[Travelled] = field(default_factory=list)
    _answers: dict[str, Message] = field(default_factory=dict)
    _ids: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated")

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        assert timeout is not None, "an exchange without a timeout may never end"
        return self.pull_messages(self.push_messages(messages))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        assert len({m.metadata.dst_node_id for m in messages}) == len(messages), "two messages to a node at a time"
        ids = []
        for message in messages:
            ids.append(str(next(self._ids)))
            message.metadata.__dict__["_message_id"] = ids[-1]
            reply = self._answer(self.nodes[message.metadata.dst_node_id], message)
            if reply is not None:
                self._answers[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._answers.pop(number) for number in message_ids if number in self._answers]

    def _answer(self, node: Node, message: Message) -> Message | None:
        there = self._travel(message, "down", message.metadata.dst_node_id)
        try:
            reply = node.wrong(there) if node.wrong else None
            reply = reply or node.app(there, node.context)
        except TimeoutError:
            return None
        except Exception as error:
            reply = Message(Error(0, repr(error)), reply_to=there)
        return self._travel(reply, "up", message.metadata.dst_node_id)

    def _travel(self, message: Message, way: str, node: int) -> Message:
        """Return what arrives: made of the bytes that Flower makes of a message."""
        if message.has_error():
            return message
        objects = {key: found.deflate() for key, found in get_all_nested_objects(message).items()}
        nbytes = sum(len(data) for data in objects.values())
        copies = [inflate_object_from_contents(message.object_id, dict(objects)) for _ in range(2)]
        for copy in copies:
            copy.metadata.__dict__["_message_id"] = message.metadata.message_id
        self.travelled.append(Travelled(node, way, nbytes, copies[0]))
        return copies[1]

    def of(self, way: str, node: int | None = None) -> list[Travelled]:
        """Return what travelled one way, of one node or all."""
        return [t for t in self.travelled if t.way == way and node in (None, t.node)]


Train = Callable[[dict[str, np.ndarray], int, int], dict[str, np.ndarray]]


def client_app(mods: list[Mod], train: Train) -> ClientApp:
    """Return an app whose training is a function of arrays, node and round, weighted by the node's number."""
    app = ClientApp(mods=mods)

    def answer(message: Message, context: Context, arrays: ArrayRecord | None) -> Message:
        metrics = MetricRecord({"num-examples": context.node_id % 100, "loss": 0.5})
        records = {"arrays": arrays, "metrics": metrics} if arrays is not None else {"metrics": metrics}
        return Message(RecordDict(records), reply_to=message)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        trained = train(arrays, context.node_id, int(message.content["config"]["server-round"]))
        return answer(message, context, ArrayRecord({name: Array(np.asarray(v)) for name, v in trained.items()}))

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        assert list(message.content["arrays"]), "the model that is evaluated"
        return answer(message, context, None)

    return app


def fleet(nodes: Iterable[int], mods: Callable[[int], list[Mod]], train: Train) -> Fleet:
    """Return a fleet of nodes, each with the mods that a function gives it."""
    made = {}
    for node in nodes:
        context = Context(run_id=RUN, node_id=node, node_config={}, state=RecordDict(), run_config={})
        made[node] = Node(client_app(mods(node), train), context)
    return Fleet(made)
