"""Events are one JSON object a line, whatever is in them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.jobs.events import JsonLines, event_line, log_event

figures = st.dictionaries(
    st.text(min_size=1).filter(lambda name: name not in ("time", "event")),
    st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text())),
)


@given(st.text(), figures)
def test_an_event_is_one_line(event: str, values: dict[str, object]) -> None:
    line = event_line(event, values, seconds=1_700_000_000.25)
    assert "\n" not in line and "\r" not in line
    assert json.loads(line) == {"time": "2023-11-14T22:13:20.250Z", "event": event, **values}


def test_what_is_logged_is_an_event() -> None:
    lines: list[str] = []
    logger = logging.Logger("test")
    handler = logging.Handler()
    handler.setFormatter(JsonLines())
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    logger.addHandler(handler)
    log_event(logger, "claim", "claimed 100% of it", shard="00001", rows=5)
    logger.warning("shard %s was taken over", "00002")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("it broke")
    claim, warning, error = map(json.loads, lines)
    assert claim["event"] == "claim" and claim["message"] == "claimed 100% of it"
    assert (claim["shard"], claim["rows"]) == ("00001", 5)
    assert abs(datetime.fromisoformat(claim["time"]).timestamp() - datetime.now(UTC).timestamp()) < 3600
    assert (warning["event"], warning["message"]) == ("warning", "shard 00002 was taken over")
    assert error["event"] == "error" and "ValueError: two" in error["traceback"]
