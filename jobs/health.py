"""Whether a container's worker lives: it touches a file as it goes, and a probe looks at the file's age.

    python -P -m batchinfer.jobs.health        # exit code 0: it lives; 1: it does not, and why

The file is named by ``BATCHINFER_HEALTH``, for the worker and the probe alike; without it nothing is
touched. This module imports the standard library alone, as a probe is started once a minute.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

HEALTH = "BATCHINFER_HEALTH"
# As long as an engine may make no step, and many times the interval of heartbeats: a worker waits out a
# store that can't be reached, and leaves by itself when that takes too long.
LIMIT_SECONDS = 600


def show_life() -> None:
    """Touch the file, where one is named. That it can't be touched is logged, and stops no job."""
    if path := os.environ.get(HEALTH):
        try:
            Path(path).touch()
        except OSError as error:
            logger.warning("%s is %s, which can't be touched: %s", HEALTH, path, error.strerror)


def find_fault() -> str | None:
    """Why the worker does not count as alive, as one sentence; None where it does."""
    path = os.environ.get(HEALTH)
    if not path:
        return f"{HEALTH} names no file: set it for the worker and the probe alike"
    try:
        age = time.time() - os.stat(path).st_mtime
    except OSError as error:
        return f"no worker has shown life in {path}: {error.strerror}"
    if age > LIMIT_SECONDS:
        return f"the worker has shown no life for {age:.0f} s, by {path}; {LIMIT_SECONDS} s are allowed"
    return None


if __name__ == "__main__":
    sys.exit(find_fault())
