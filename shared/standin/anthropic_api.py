"""The Anthropic Messages API: messages, batches of them, count_tokens, models.

Shapes as the real SDK (2.11) reads them.
"""

from __future__ import annotations

import re
from typing import Any

from shared.standin import engine
from shared.standin.batches import KINDS, Asked, Batch, Batches, jsonl, when
from shared.standin.wire import RefusedError, Reply, Request, broken, check_access, schema_or_none, stopped

MODELS = (
    "claude-opus-5-5",
    "claude-sonnet-5-5",
    "claude-sonnet-5",
    "claude-haiku-5-5",
    "claude-haiku-4-5",
)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_NO_SAMPLING_SINCE = "2026-10-21"
_THINKING = "Reading the prompt again before answering."
"""What a model that thinks unless told otherwise thinks; it comes first in the content and counts as output."""


def handle(request: Request, fault: str, bad_share: float) -> Reply:
    """The answer to one request; ``fault`` is a content fault to put into it."""
    path = request.path.rstrip("/")
    if request.method == "POST" and path == "/v1/messages":
        return _message(request, fault, bad_share)
    if request.method == "POST" and path == "/v1/messages/count_tokens":
        check_access(request, str(request.json.get("model", "")))
        return Reply(200, {"input_tokens": _input_tokens(request.json)})
    if request.method == "GET" and path == "/v1/models":
        check_access(request)
        data = [_model(name) for name in MODELS]
        return Reply(200, {"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]})
    if request.method == "GET" and path.startswith("/v1/models/"):
        name = path.removeprefix("/v1/models/")
        check_access(request, name)
        return Reply(200, _model(name))
    raise RefusedError(404, f"{request.method} {request.path} is not served here")


BATCHES = "/v1/messages/batches"


def batches(request: Request, store: Batches, fault: str) -> Reply | None:
    """The answer to a request about batches; None when it is about something else."""
    path = request.path.rstrip("/")
    identity, _, verb = path.removeprefix(BATCHES).strip("/").partition("/")
    if path.removeprefix(BATCHES)[:1] not in ("", "/") or not path.startswith(BATCHES):
        return None
    check_access(request)
    if request.method == "POST" and not identity:
        asked = [Asked(one["custom_id"], "/v1/messages", one["params"]) for one in request.json.get("requests") or []]
        if wrong := [one.custom_id for one in asked if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one.custom_id)]:
            raise RefusedError(400, f"requests: custom_id {wrong[0]!r} does not match ^[a-zA-Z0-9_-]{{1,64}}$")
        return Reply(200, _batch(store.create("anthropic", "msgbatch_", "", asked, fault)))
    if request.method == "POST" and verb == "cancel":
        return Reply(200, _batch(store.cancel("anthropic", identity)))
    if request.method == "GET" and not identity:
        after, limit = request.query.get("after_id"), int(request.query.get("limit", 20))
        found = [_batch(batch) for batch in store.all("anthropic")]
        start = next((n + 1 for n, row in enumerate(found) if row["id"] == after), 0)
        page = found[start : start + limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return Reply(200, {"data": page, "has_more": len(found) > start + limit, **ends})
    if request.method == "GET" and not verb:
        return Reply(200, _batch(store.get("anthropic", identity)))
    if request.method == "GET" and verb == "results":
        batch = store.get("anthropic", identity)
        if not batch.ended:
            raise RefusedError(404, f"{identity} has not ended")
        return Reply(200, jsonl([_result(row) for row in batch.results()]), {"Content-Type": "application/x-jsonl"})
    return None


def _batch(batch: Batch) -> dict[str, Any]:
    """This API has batches that end, and none that fail: of a failed one every request is errored."""
    counts = {kind: batch.counts[kind] for kind in KINDS}
    if batch.failed:
        counts["errored"] = batch.total
    tally = {"processing": batch.total, **dict.fromkeys(KINDS, 0)} if not batch.ended else {"processing": 0, **counts}
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": "ended" if batch.ended else "canceling" if batch.cancelled else "in_progress",
        "request_counts": tally,
        "created_at": when(batch.created),
        "expires_at": when(batch.created + 86_400),
        "ended_at": when(batch.created) if batch.ended else None,
        "cancel_initiated_at": when(batch.created) if batch.cancelled else None,
        "archived_at": None,
        "results_url": f"{BATCHES}/{batch.id}/results" if batch.ended else None,
    }


def _result(row: dict[str, Any]) -> dict[str, Any]:
    result = {"type": row["kind"]}
    if row["kind"] in ("succeeded", "errored"):
        result["message" if row["kind"] == "succeeded" else "error"] = row["body"]
    return {"custom_id": row["custom_id"], "result": result}


def error(request: Request, status: int, message: str, kind: str = "", param: str | None = None) -> Reply:
    """An error in this API's shape. ``kind="quota"`` is a spend limit of the account."""
    body: dict[str, Any] = {"type": _TYPES.get(status, "api_error"), "message": message}
    if kind == "quota":
        body["details"] = {"error_code": "enforced_spend_limit_reached"}
    return Reply(status, {"type": "error", "error": body, "request_id": f"req_{request.id}"})


def headers(request: Request, limit: int, remaining: int, reset: str) -> dict[str, str]:
    """What every answer carries. ``reset`` is an RFC 3339 time."""
    return {
        "request-id": f"req_{request.id}",
        "anthropic-ratelimit-requests-limit": str(limit),
        "anthropic-ratelimit-requests-remaining": str(remaining),
        "anthropic-ratelimit-requests-reset": reset,
        "anthropic-ratelimit-input-tokens-limit": str(limit * 1000),
        "anthropic-ratelimit-input-tokens-remaining": str(remaining * 1000),
        "anthropic-ratelimit-input-tokens-reset": reset,
        "anthropic-ratelimit-output-tokens-limit": str(limit * 200),
        "anthropic-ratelimit-output-tokens-remaining": str(remaining * 200),
        "anthropic-ratelimit-output-tokens-reset": reset,
    }


def _model(name: str) -> dict[str, Any]:
    return {"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01T00:00:00Z"}


def _message(request: Request, fault: str, bad_share: float) -> Reply:
    body = request.json
    model = str(body.get("model", ""))
    check_access(request, model)
    _check(body, model, request.headers.get("anthropic-version", ""))
    system, user = _text(body.get("system")), _turns(body["messages"])
    limit, thinking = int(body["max_tokens"]), _thinks(model, body.get("thinking"))
    thought = engine.tokens(_THINKING) if thinking else 0
    answer = engine.answer(system, user, _schema(body), model, max(0, limit - thought), bad_share, request.attempt)
    text, reason, output = answer.text, "max_tokens" if answer.truncated else "end_turn", answer.output_tokens
    text, stop = stopped(text, body.get("stop_sequences"))
    if stop is not None:
        reason, output = "stop_sequence", engine.tokens(text)
    if fault == "truncate":
        text, reason = text[: len(text) // 2], "max_tokens"
        output = engine.tokens(text)
    elif fault == "broken_json":
        text = broken(text)
    content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    if thinking:
        content.insert(0, {"type": "thinking", "thinking": _THINKING, "signature": f"sig_{request.id}"})
    result: dict[str, Any] = {
        "id": f"msg_{request.id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": {
            "input_tokens": _input_tokens(body),
            "output_tokens": min(limit, output + thought),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens_details": {"thinking_tokens": min(limit, thought)},
        },
    }
    if fault == "refuse":
        refusal = {"type": "refusal", "category": "other", "explanation": "The stand-in was asked to refuse."}
        result |= {"content": [], "stop_reason": "refusal", "stop_details": refusal}
        result["usage"]["output_tokens"] = 0
    usage = result["usage"]
    return Reply(
        200,
        result,
        model=model,
        input_tokens=usage["input_tokens"],
        output_tokens=usage["output_tokens"],
        answered=True,
    )


def _check(body: dict[str, Any], model: str, version: str) -> None:
    """Raises:
    RefusedError: today's API refuses the request with 400.
    """
    if not model:
        raise RefusedError(400, "model: Field required")
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise RefusedError(400, "messages: at least one message is required")
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        raise RefusedError(400, "max_tokens: Field required, at least 1")
    if body.get("stream"):
        raise RefusedError(400, "stream: this stand-in does not stream")
    modern = _generation(model) >= _FIXED_SINCE.get(_family(model), (99, 0))
    for name in ("temperature", "top_p", "top_k"):
        default = {"temperature": 1, "top_p": 1}.get(name)
        if name in body and (version >= _NO_SAMPLING_SINCE or (modern and body[name] != default)):
            raise RefusedError(400, f"{name}: is not supported on this model")
    if modern and body["messages"][-1].get("role") == "assistant":
        raise RefusedError(400, "messages: this model does not support assistant message prefill")
    thinking = body.get("thinking") or {}
    if "sonnet-5-5" in model and thinking.get("type") == "disabled":
        raise RefusedError(400, "thinking.type: 'disabled' is not supported on this model; use 'between_tools'")
    if modern and (body.get("tool_choice") or {}).get("type") in ("tool", "any"):
        raise RefusedError(400, "tool_choice: forcing a tool is not supported on this model")


_FIXED_SINCE = {"sonnet": (5, 0), "opus": (5, 0), "fable": (5, 0), "haiku": (5, 5)}


def _family(model: str) -> str:
    match = re.match(r"claude-([a-z]+)-", model)
    return match[1] if match else ""


def _generation(model: str) -> tuple[int, int]:
    match = re.match(r"claude-[a-z]+-(\d+)(?:-(\d)(?!\d))?", model)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


def _thinks(model: str, thinking: dict[str, Any] | None) -> bool:
    """Models of generation 5.5 think unless told otherwise; older ones only when told to."""
    kind = (thinking or {}).get("type")
    if kind in ("disabled", "between_tools"):
        return False
    return kind in ("enabled", "adaptive") or _generation(model) >= (5, 5)


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    form = (body.get("output_config") or {}).get("format") or {}
    return schema_or_none(form.get("schema")) if form.get("type") == "json_schema" else None


def _text(content: Any) -> str:
    """The text of a system prompt or a message: a string, or blocks of which some are text."""
    if isinstance(content, str):
        return content
    return "\n\n".join(str(block.get("text", "")) for block in content or [] if isinstance(block, dict))


def _turns(messages: list[dict[str, Any]]) -> str:
    return "\n\n".join(_text(message.get("content")) for message in messages)


def _input_tokens(body: dict[str, Any]) -> int:
    """What ``count_tokens`` says and ``usage`` bills: all texts, 3 for each message, and the schema."""
    schema = _schema(body)
    texts = [_text(body.get("system")), *(_text(m.get("content")) for m in body.get("messages") or [])]
    extra = engine.tokens(repr(schema)) if schema else 0
    return sum(engine.tokens(text) + 3 for text in texts if text) + extra
