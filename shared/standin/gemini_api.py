"""The Gemini API: generateContent, batches of it, file uploads, countTokens, embedContent, batchEmbedContents, models.

Under ``/v1`` and ``/v1beta``; shapes as the real SDK (3.4) reads them.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from shared.standin import embedding, engine
from shared.standin.batches import Asked, Batch, Batches, jsonl, lines_of, when
from shared.standin.filling import lower_case
from shared.standin.wire import RefusedError, Reply, Request, broken, check_access, schema_or_none, stopped

MODELS = (
    "gemini-4-argon",
    "gemini-3.8-flash",
    "gemini-3.5-flash-lite",
    "gemini-3.1-pro-preview",
    "gemini-embedding-001",
)
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_PATH = re.compile(r"/v1(?:beta|alpha)?/models(?:/([^/:]+)(?::(\w+))?)?/?$")
_DIMENSIONS = 3072
_THOUGHTS = 12  # tokens of thinking, which these models cannot switch off; a budget of 0 does


def handle(request: Request, fault: str, bad_share: float) -> Reply:
    """The answer to one request; ``fault`` is a content fault to put into it."""
    match = _PATH.match(request.path)
    model, verb = (match[1] or "", match[2] or "") if match else ("", "")
    if request.method == "POST" and match and verb in _VERBS:
        check_access(request, model)
        return _VERBS[verb](request, model, fault, bad_share)
    if request.method == "GET" and match and not verb:
        check_access(request, model)
        return Reply(200, _model(model) if model else {"models": [_model(name) for name in MODELS]})
    raise RefusedError(404, f"{request.method} {request.path} is not served here")


def error(request: Request, status: int, message: str, kind: str = "", param: str | None = None) -> Reply:
    """An error in this API's shape; 529 becomes 503, as there. 429 says in its body when to come back."""
    status = 503 if status == 529 else status
    body: dict[str, Any] = {"code": status, "message": message, "status": _STATUS.get(status, "INTERNAL")}
    if kind == "quota":  # the day's: as 429 as any other, and only its details tell
        violation = {"quotaMetric": "generate_content_requests", "quotaId": "GenerateRequestsPerDayPerProjectPerModel"}
        body["details"] = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]}]
    return Reply(status, {"error": body})


def retry_info(reply: Reply, seconds: float) -> None:
    """Add ``google.rpc.RetryInfo`` to an error."""
    assert isinstance(reply.body, dict)
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{seconds:g}s"}
    reply.body["error"]["details"] = [info]


def headers(request: Request, limit: int, remaining: int, reset: str) -> dict[str, str]:
    """This API tells no limits in its headers."""
    return {}


def _model(name: str) -> dict[str, Any]:
    methods = ["embedContent"] if "embedding" in name else ["generateContent", "countTokens"]
    return {
        "name": f"models/{name}",
        "displayName": name,
        "version": "001",
        "inputTokenLimit": 1_048_576,
        "outputTokenLimit": 65_536,
        "supportedGenerationMethods": methods,
    }


def _generate(request: Request, model: str, fault: str, bad_share: float) -> Reply:
    body = request.json
    contents = body.get("contents")
    if not isinstance(contents, list) or not contents:
        raise RefusedError(400, "contents are required")
    config = body.get("generationConfig") or {}
    system = _text(body.get("systemInstruction"))
    user = "\n\n".join(_text(content) for content in contents)
    schema = _schema(config)
    limit = config.get("maxOutputTokens") or 8192
    budget = (config.get("thinkingConfig") or {}).get("thinkingBudget")
    thoughts = 0 if budget == 0 else min(_THOUGHTS, limit)
    answer = engine.answer(system, user, schema, model, limit - thoughts, bad_share, request.attempt)
    text, stop = stopped(answer.text, config.get("stopSequences"))
    reason = "MAX_TOKENS" if answer.truncated and stop is None else "STOP"
    if fault == "truncate":
        text, reason = text[: len(text) // 2], "MAX_TOKENS"
    elif fault == "broken_json":
        text = broken(text)
    elif fault == "refuse":
        text, reason, thoughts = "", "SAFETY", 0
    candidate: dict[str, Any] = {"finishReason": reason, "index": 0}
    if text:
        candidate["content"] = {"role": "model", "parts": [{"text": text}]}
    input_tokens, output_tokens = _input_tokens(body), engine.tokens(text)
    result = {
        "candidates": [candidate],
        "usageMetadata": {
            "promptTokenCount": input_tokens,
            "candidatesTokenCount": output_tokens,
            "thoughtsTokenCount": thoughts,
            "totalTokenCount": input_tokens + output_tokens + thoughts,
        },
        "modelVersion": model,
        "responseId": request.id,
    }
    return Reply(200, result, {}, model, input_tokens, output_tokens + thoughts, answered=True)


def _count(request: Request, model: str, fault: str, bad_share: float) -> Reply:
    body = request.json
    return Reply(200, {"totalTokens": _input_tokens(body.get("generateContentRequest") or body)})


def _embed(request: Request, model: str, fault: str, bad_share: float) -> Reply:
    body = request.json
    values, count = _vector(body)
    return Reply(200, {"embedding": {"values": values}}, {}, model, count, 0, answered=True)


def _batch_embed(request: Request, model: str, fault: str, bad_share: float) -> Reply:
    parts = request.json.get("requests")
    if not isinstance(parts, list) or not 1 <= len(parts) <= 100:
        raise RefusedError(400, "requests must hold 1 to 100 contents")
    vectors = [_vector(part) for part in parts]
    result = {"embeddings": [{"values": values} for values, _ in vectors]}
    return Reply(200, result, {}, model, sum(count for _, count in vectors), 0, answered=True)


def _vector(part: dict[str, Any]) -> tuple[list[float], int]:
    dimensions = part.get("outputDimensionality") or _DIMENSIONS
    if not 1 <= dimensions <= _DIMENSIONS:
        raise RefusedError(400, f"output_dimensionality must be 1 to {_DIMENSIONS}, got {dimensions}")
    text = _text(part.get("content"))
    if not text:
        raise RefusedError(400, "content is empty")
    return embedding.vector(text, dimensions).tolist(), engine.tokens(text)


def _schema(config: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of a JSON answer: the API's own dialect, or JSON schema; ``{}`` for JSON of any shape."""
    if config.get("responseMimeType") != "application/json":
        return None
    plain = config.get("responseJsonSchema") or config.get("response_json_schema")
    own = config.get("responseSchema") or config.get("response_schema")
    if plain is not None:
        return schema_or_none(plain)
    return lower_case(schema_or_none(own) or {}) if own is not None else {}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = (content or {}).get("parts") or []
    return "\n\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _input_tokens(body: dict[str, Any]) -> int:
    config = body.get("generationConfig") or {}
    schema = _schema(config)
    texts = [_text(body.get("systemInstruction")), *(_text(content) for content in body.get("contents") or [])]
    return sum(engine.tokens(text) + 3 for text in texts if text) + (engine.tokens(repr(schema)) if schema else 0)


_VERBS = {
    "generateContent": _generate,
    "countTokens": _count,
    "embedContent": _embed,
    "batchEmbedContents": _batch_embed,
}


# ---------------------------------------------------------------- batches

_BATCHES = re.compile(r"(/upload)?/v1(?:beta|alpha)?/(files|batches|models)(?:/([^/:]+))?(?::(\w+))?/?$")


def batches(request: Request, store: Batches, fault: str) -> Reply | None:
    """The answer to a request about files or batches; None when it is about something else."""
    match = _BATCHES.match(unquote(request.path))
    if match is None or (match[2] == "models" and match[4] != "batchGenerateContent"):
        return None
    upload, what, identity, verb = (part or "" for part in match.groups())
    if request.method == "POST" and upload:
        return _upload(request, store)
    check_access(request)
    if request.method == "GET" and (what, verb) == ("files", "download"):
        content = jsonl([_response(row, "key") for row in store.get("gemini", identity).results()])
        return Reply(200, content, {"Content-Type": "application/octet-stream"})
    if request.method == "POST" and what == "models":
        batch = request.json["batch"]
        source = batch["inputConfig"].get("fileName", "")
        if source:
            rows = lines_of(store.uploaded(source.removeprefix("files/")))
        else:
            rows = [one | {"key": one["metadata"]["key"]} for one in batch["inputConfig"]["requests"]["requests"]]
        path = f"/v1/models/{identity}:generateContent"
        asked = [Asked(row["key"], path, _as_alone(row["request"])) for row in rows]
        return Reply(200, _batch(store.create("gemini", "b", identity, asked, fault, batch["displayName"], source)))
    if request.method == "POST" and verb == "cancel":
        store.cancel("gemini", identity)
        return Reply(200, {})
    if request.method == "GET" and what == "batches" and not identity:
        size, start = int(request.query.get("pageSize", 50)), int(request.query.get("pageToken") or 0)
        found = [_batch(batch) for batch in store.all("gemini")]
        more = {"nextPageToken": str(start + size)} if len(found) > start + size else {}
        return Reply(200, {"operations": found[start : start + size], **more})
    if request.method == "GET" and what == "batches" and not verb:
        return Reply(200, _batch(store.get("gemini", identity)))
    return None


def _as_alone(body: dict[str, Any]) -> dict[str, Any]:
    """The body with its fields in the order in which our client sends them alone: the SDK's batches have another."""
    contents = [{"role": content["role"], "parts": content["parts"]} for content in body["contents"]]
    return body | {"contents": contents}


def _upload(request: Request, store: Batches) -> Reply:
    """Resumable: a first request asks where to send the bytes to; the bytes then come in pieces."""
    command = request.headers.get("x-goog-upload-command", "")
    if command == "start":  # the address in its answer is all that the others show
        check_access(request)
        where = f"http://{request.headers['Host']}{request.path}?upload_id={store.begin()}"
        return Reply(200, {}, {"x-goog-upload-url": where, "x-goog-upload-status": "active"})
    name = store.append(request.query.get("upload_id", ""), request.body, last="finalize" in command)
    status = {"x-goog-upload-status": "final" if name else "active"}
    return Reply(200, {"file": {"name": f"files/{name}", "sizeBytes": "0"}} if name else {}, status)


def _batch(batch: Batch) -> dict[str, Any]:
    """An operation: ``output`` once it is done; the answers inline when the requests were, else a file of them."""
    state = "SUCCEEDED" if batch.ended else "RUNNING" if batch.counts else "PENDING"
    if batch.failed or batch.cancelled:
        state = "FAILED" if batch.failed else "CANCELLED"
    facts: dict[str, Any] = {
        "model": f"models/{batch.model}",
        "displayName": batch.name,
        "state": f"BATCH_STATE_{state}",
        "createTime": when(batch.created),
        "updateTime": when(batch.created),
        "name": f"batches/{batch.id}",
    }
    if batch.ended and not batch.failed:
        rows = [] if batch.source else [_response(row, "metadata") for row in batch.results()]
        inline = {"inlinedResponses": {"inlinedResponses": rows}}
        facts["output"] = {"responsesFile": f"files/{batch.id}"} if batch.source else inline
    wrong = {"error": {"code": 13, "message": "the batch failed"}} if batch.failed else {}
    return {"name": f"batches/{batch.id}", "done": batch.ended, "metadata": facts, **wrong}


def _response(row: dict[str, Any], key: str) -> dict[str, Any]:
    named = {"metadata": {"key": row["custom_id"]}} if key == "metadata" else {"key": row["custom_id"]}
    if row["kind"] == "succeeded":
        return {"response": row["body"], **named}
    code = {"expired": 4, "canceled": 1}.get(row["kind"], 3)
    return {"error": {"code": code, "message": f"the request was {row['kind']}"}, **named}
