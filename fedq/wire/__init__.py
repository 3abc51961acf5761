"""What travels: frames between the ranks of a job, and messages between parties across a network.

`frame` holds the frame and the body of payloads, `message` the self-describing message around it, `head` its fixed
fields and tables, `payload` the message of a single tensor, `limits` what a receiver accepts, `crc32c` the checksum.
How bytes travel is not decided here.
"""

from fedq.wire.crc32c import crc32c, values_crc32c
from fedq.wire.frame import (
    HEADER_NBYTES,
    MAGIC,
    VERSION,
    Frame,
    Kind,
    body_nbytes,
    check_layout,
    join_body,
    join_payloads,
    split_body,
)
from fedq.wire.limits import Limits
from fedq.wire.message import SERVER, Assembler, Message, note, read_note, unpack
from fedq.wire.payload import decode, pack_payload

__all__ = [
    "HEADER_NBYTES",
    "MAGIC",
    "SERVER",
    "VERSION",
    "Assembler",
    "Frame",
    "Kind",
    "Limits",
    "Message",
    "body_nbytes",
    "check_layout",
    "crc32c",
    "decode",
    "join_body",
    "join_payloads",
    "note",
    "pack_payload",
    "read_note",
    "split_body",
    "unpack",
    "values_crc32c",
]
