"""A run's folder: the files that a job leaves behind, and what they say about where it ran."""

from fedq.runfolder.environment import environment_info, git_commit
from fedq.runfolder.folder import (
    FLUSH_EVERY_ROUNDS,
    STAGES,
    SUMMARY_KEYS,
    NullRunFolder,
    RunFolder,
    holds_run,
    write_model,
)
from fedq.runfolder.lock import Holder, holder_of
from fedq.runfolder.side import SideOutput
from fedq.runfolder.tables import SCHEMA_VERSION

__all__ = [
    "FLUSH_EVERY_ROUNDS",
    "SCHEMA_VERSION",
    "STAGES",
    "SUMMARY_KEYS",
    "Holder",
    "NullRunFolder",
    "RunFolder",
    "SideOutput",
    "environment_info",
    "git_commit",
    "holder_of",
    "holds_run",
    "write_model",
]
