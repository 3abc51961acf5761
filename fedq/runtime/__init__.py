"""Where this process runs: its rank, its device, and the process group, from the launcher's environment alone."""

from fedq.runtime.generation import agent_store
from fedq.runtime.group import Runtime, distributed, existing_group, from_root, local_root_first, on_every_rank, on_root
from fedq.runtime.launcher import Ranks, check_lone_process, detect, num_restarts, rendezvous, without_local_rank
from fedq.runtime.streams import lasting_streams

__all__ = [
    "Ranks",
    "Runtime",
    "agent_store",
    "check_lone_process",
    "detect",
    "distributed",
    "existing_group",
    "from_root",
    "lasting_streams",
    "local_root_first",
    "num_restarts",
    "on_every_rank",
    "on_root",
    "rendezvous",
    "without_local_rank",
]
