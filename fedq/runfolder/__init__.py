"""A run's folder: the files that a job leaves behind, and what they say about where it ran."""

from fedq.runfolder.environment import environment_info, git_commit
from fedq.runfolder.folder import FLUSH_EVERY_ROUNDS, STAGES, SUMMARY_KEYS, NullRunFolder, RunFolder, write_model
from fedq.runfolder.tables import SCHEMA_VERSION

__all__ = [
    "FLUSH_EVERY_ROUNDS",
    "SCHEMA_VERSION",
    "STAGES",
    "SUMMARY_KEYS",
    "NullRunFolder",
    "RunFolder",
    "environment_info",
    "git_commit",
    "write_model",
]
