"""Events for log collectors: one JSON object a line on stderr, with its time, its name and its figures."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class LogFormat(StrEnum):
    """What a log on stderr is: lines for people, or one JSON object a line."""

    TEXT = "text"
    JSON = "json"


def event_line(event: str, figures: Mapping[str, Any], seconds: float | None = None) -> str:
    """An event as one line of JSON; ``seconds`` since the epoch is when it was, by default now."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    time = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": time, "event": event, **figures}, ensure_ascii=False, default=str)


def print_event(event: str, **figures: Any) -> None:
    """Print an event on stderr."""
    print(event_line(event, figures), file=sys.stderr, flush=True)


def log_event(logger: logging.Logger, event: str, message: str, **figures: Any) -> None:
    """Log an event: ``message`` for people, and its name and figures where the log is JSON."""
    logger.info("%s", message, extra={"event": event, "figures": figures})


class JsonLines(logging.Formatter):
    """What is logged, as events; what is logged as a text alone is the event ``info``, ``warning`` or
    ``error``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        figures = dict(getattr(record, "figures", {}))
        if record.exc_info:
            figures["traceback"] = self.formatException(record.exc_info)
        event = getattr(record, "event", record.levelname.lower())
        return event_line(event, {"message": record.getMessage(), **figures}, record.created)


def log_to_stderr(form: LogFormat) -> None:
    """Have this process log on stderr, from INFO on."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(message)s")
    handler.setFormatter(JsonLines() if form is LogFormat.JSON else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
