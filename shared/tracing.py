"""OpenTelemetry spans, when asked for: one a stage, one a batch of records, one a model call.

Sent to Logfire when ``LOGFIRE_TOKEN`` is set, or to any OTLP endpoint (``OTEL_EXPORTER_OTLP_ENDPOINT``). Otherwise
nothing is sent and OpenTelemetry is not imported. Prompts and answers stay out of spans unless ``TRACE_TEXT=1``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from shared.errors import SettingsError

LOGFIRE = "https://logfire-us.pydantic.dev"
"""Logfire's OTLP base (vendor documentation, "Alternative clients"); ``LOGFIRE_BASE_URL`` overrides it."""


@contextlib.contextmanager
def span(name: str, **attributes: Any) -> Iterator[Span]:
    """A span around a block; costs a look at the environment when tracing is off."""
    tracer = _tracer()
    if tracer is None:
        yield Span(None)
        return
    with tracer.start_as_current_span(name, attributes=_known(attributes)) as current:
        yield Span(current)


class Span:
    """What a block may say of itself while it runs; does nothing when tracing is off."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def set(self, **attributes: Any) -> None:
        """Add attributes; None is left out."""
        if self._span is not None:
            self._span.set_attributes(_known(attributes))

    def text(self, **texts: str) -> None:
        """Add prompts or answers, only when ``TRACE_TEXT=1``."""
        if self._span is not None and os.environ.get("TRACE_TEXT") == "1":
            self._span.set_attributes(texts)


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


@functools.cache
def _tracer() -> Any:
    token, endpoint = os.environ.get("LOGFIRE_TOKEN"), os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not token and not endpoint:
        return None
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(
            f"tracing is asked for (LOGFIRE_TOKEN or OTEL_EXPORTER_OTLP_ENDPOINT) but not installed: {error}",
            "make setup, or unset the variable",
        ) from None
    if token:
        base = os.environ.get("LOGFIRE_BASE_URL", LOGFIRE).rstrip("/")
        exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", headers={"Authorization": token}, timeout=5)
    else:
        exporter = OTLPSpanExporter(timeout=5)  # reads its own variables
    provider = TracerProvider(resource=Resource.create({"service.name": "synthmill"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.get_tracer("synthmill")


def flush() -> None:
    """Send what is left; at the end of a stage."""
    if _tracer() is not None:
        from opentelemetry import trace

        provider: Any = trace.get_tracer_provider()
        provider.shutdown()
