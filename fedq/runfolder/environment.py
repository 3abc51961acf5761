"""What the numbers were computed with: versions, hardware, commit. Only looks; changes nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import numpy as np
import torch

from fedq.runtime.hardware import cpu_name


def environment_info() -> dict[str, Any]:
    """Return what the numbers were computed with: `versions`, `platform`, `cpu`, `cpu_count`, `gpu` (or None)."""
    try:
        fedq_version: str | None = metadata.version("fedq")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        fedq_version = None
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "fedq": fedq_version,
            "cuda": torch.version.cuda,
        },
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def git_commit(path: str | os.PathLike[str]) -> str | None:
    """Return the commit that tracks a folder, `+dirty` if tracked files differ from it; None if there is none."""

    def git(*command: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # looking must not write to the repository
        call = ["git", "-C", os.fspath(path), *command]
        done = subprocess.run(call, capture_output=True, text=True, timeout=5, check=True, env=environment)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # an environment inside somebody else's repository is not tracked by it
        commit = git("rev-parse", "HEAD")
        return commit + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
