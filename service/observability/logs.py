"""Structured logs: one JSON object per line, never with a user's text."""

import logging.config
import warnings

import transformers
from pythonjsonlogger.core import RESERVED_ATTRS


def configure(level: str) -> None:
    """Send all logs to stderr as JSON.

    uvicorn's access log is silenced: `service.pipeline.request_record` logs every request.
    """
    logging.captureWarnings(True)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "json": {
                    "()": "pythonjsonlogger.json.JsonFormatter",
                    # uvicorn repeats its message there, in colour.
                    "reserved_attrs": [*RESERVED_ATTRS, "color_message"],
                    "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s",
                    "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
                }
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": level, "handlers": ["stderr"]},
            "loggers": {"uvicorn.access": {"level": "CRITICAL"}},
        }
    )
