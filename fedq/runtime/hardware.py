"""What this machine calls itself."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's name as Linux reports it, elsewhere what Python knows of it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()
