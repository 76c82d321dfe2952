"""How the server's log lines look: text or JSON, each with its time in UTC. It knows nothing of what is logged.

A record may have `fields` (`extra={"fields": {...}}`). They become `name=value` in text, and members of the object in JSON.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
OURS = ("stallfree", "uvicorn")
"""The loggers whose level --log-level sets. Other libraries log from level warning on."""


def configure(level: Level, format: Format) -> None:
    """Write every log line of this process to stderr in one `format`. The loggers `OURS` log from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if format == "json" else Text())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())


class Text(logging.Formatter):
    """`2026-01-31T12:00:00.000Z warning stallfree.server.door: message name=value`, and a traceback in lines below."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items() if value is not None)
        words = f"{_time(record)} {record.levelname.lower()} {record.name}: {record.getMessage()}"
        lines = [f"{words} {fields}" if fields else words]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)


class Json(logging.Formatter):
    """One object in one line: `time`, `level`, `logger`, `message`, the record's fields, and `traceback` after an exception."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, object] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        values |= {"message": record.getMessage(), **_fields(record)}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def _time(record: logging.LogRecord) -> str:
    """When it was logged, in UTC, to the millisecond (ISO 8601)."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields
