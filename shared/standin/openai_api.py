"""The OpenAI API: chat completions, batches of them, files, responses, input token counts, embeddings, models.

Shapes as the real SDK (3.52) reads them; also what any OpenAI-compatible server offers.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from shared.standin import embedding, engine
from shared.standin.batches import Asked, Batch, Batches, jsonl, lines_of
from shared.standin.wire import CREATED, RefusedError, Reply, Request, broken, check_access, schema_or_none, stopped

MODELS = (
    "gpt-6.1-sol",
    "gpt-6.1-terra",
    "gpt-6-sol",
    "gpt-6-luna",
    "gpt-5.6-luna",
    "gpt-5.4-mini",
    "synthmill-compress",
    "text-embedding-3-small",
    "text-embedding-3-large",
)
_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
_REFUSAL = "I'm sorry, but I can't help with that."
_REASONING = 16  # tokens a reasoning model spends unless told "none"
_DIMENSIONS = {"text-embedding-3-large": 3072}
MAX_INPUTS, MAX_INPUT_TOKENS, MAX_REQUEST_TOKENS = 2048, 8192, 300_000


def handle(request: Request, fault: str, bad_share: float) -> Reply:
    """The answer to one request; ``fault`` is a content fault to put into it."""
    path = request.path.rstrip("/")
    if request.method == "POST" and path in _POSTS:
        check_access(request, str(request.json.get("model", "")))
        if not request.json.get("model"):
            raise RefusedError(400, "you must provide a model parameter", param="model")
        return _POSTS[path](request, fault, bad_share)
    if request.method == "GET" and path == "/v1/models":
        check_access(request)
        return Reply(200, {"object": "list", "data": [_model(name) for name in MODELS]})
    if request.method == "GET" and path.startswith("/v1/models/"):
        name = path.removeprefix("/v1/models/")
        check_access(request, name)
        return Reply(200, _model(name))
    raise RefusedError(404, f"{request.method} {request.path} is not served here")


def error(request: Request, status: int, message: str, kind: str = "", param: str | None = None) -> Reply:
    """An error in this API's shape. ``kind="quota"`` is an account without credit; 529 becomes 503, as there."""
    if kind == "quota":
        kind, name = "insufficient_quota", "insufficient_quota"
    else:
        name = "requests" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    body = {"message": message, "type": name, "param": param, "code": kind or _CODES.get(status)}
    return Reply(503 if status == 529 else status, {"error": body})


def headers(request: Request, limit: int, remaining: int, reset: str) -> dict[str, str]:
    """What every answer carries."""
    return {
        "x-request-id": f"req_{request.id}",
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(remaining),
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": str(limit * 1000),
        "x-ratelimit-remaining-tokens": str(remaining * 1000),
        "x-ratelimit-reset-tokens": "1s",
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "system"}


# ---------------------------------------------------------------- text


def _chat(request: Request, fault: str, bad_share: float) -> Reply:
    body = request.json
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "messages must be a list with at least one message", param="messages")
    if body.get("n", 1) != 1:
        raise RefusedError(400, "n: this stand-in gives one choice", "unsupported_value", "n")
    _check(body)
    system = "\n\n".join(_text(m.get("content")) for m in messages if m.get("role") in ("system", "developer"))
    user = "\n\n".join(_text(m.get("content")) for m in messages if m.get("role") not in ("system", "developer"))
    form = body.get("response_format") or {}
    schema = (
        schema_or_none((form.get("json_schema") or {}).get("schema")) if form.get("type") == "json_schema" else None
    )
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop")
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 4096
    reasoning = _reasoning(body, body.get("reasoning_effort"), limit)
    done = _complete(body, system, user, schema, limit - reasoning, stops, fault, bad_share, request.attempt)
    message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
    reason = "length" if done.truncated else "stop"
    if fault == "refuse":
        message |= {"content": None, "refusal": _REFUSAL}
        reason = "stop"
    input_tokens, output_tokens = _input_tokens(messages, schema), done.tokens + reasoning
    result = {
        "id": f"chatcmpl-{request.id}",
        "object": "chat.completion",
        "created": CREATED,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        "usage": {
            "prompt_tokens": input_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        },
    }
    return Reply(200, result, {}, body["model"], input_tokens, output_tokens, answered=True)


def _responses(request: Request, fault: str, bad_share: float) -> Reply:
    body = request.json
    _check(body)
    system, messages = _response_input(body)
    user = "\n\n".join(_text(m.get("content")) for m in messages if m.get("role") not in ("system", "developer"))
    form = (body.get("text") or {}).get("format") or {}
    schema = schema_or_none(form.get("schema")) if form.get("type") == "json_schema" else None
    limit = body.get("max_output_tokens") or 4096
    reasoning = _reasoning(body, (body.get("reasoning") or {}).get("effort"), limit)
    done = _complete(body, system, user, schema, limit - reasoning, None, fault, bad_share, request.attempt)
    content: dict[str, Any] = {"type": "output_text", "text": done.text, "annotations": []}
    if fault == "refuse":
        content = {"type": "refusal", "refusal": _REFUSAL}
    status = "incomplete" if done.truncated else "completed"
    input_tokens, output_tokens = _input_tokens([{"content": system}, *messages], schema), done.tokens + reasoning
    output: list[dict[str, Any]] = [
        {"type": "message", "id": f"msg_{request.id}", "status": status, "role": "assistant", "content": [content]}
    ]
    if reasoning:
        output.insert(0, {"type": "reasoning", "id": f"rs_{request.id}", "summary": []})
    result = {
        "id": f"resp_{request.id}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if done.truncated else None,
        "model": body["model"],
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": input_tokens + output_tokens,
        },
    }
    return Reply(200, result, {}, body["model"], input_tokens, output_tokens, answered=True)


def _count(request: Request, fault: str, bad_share: float) -> Reply:
    body = request.json
    system, messages = _response_input(body)
    form = (body.get("text") or {}).get("format") or {}
    count = _input_tokens([{"content": system}, *messages], form.get("schema"))
    return Reply(200, {"object": "response.input_tokens", "input_tokens": count})


class _Done:
    """An answer after limits, stop sequences and content faults."""

    def __init__(self, text: str, truncated: bool) -> None:
        self.text, self.truncated, self.tokens = text, truncated, engine.tokens(text)


def _complete(
    body: dict[str, Any],
    system: str,
    user: str,
    schema: dict[str, Any] | None,
    limit: int,
    stops: list[str] | None,
    fault: str,
    bad_share: float,
    attempt: str,
) -> _Done:
    if fault == "refuse":
        return _Done("", False)
    answer = engine.answer(system, user, schema, body["model"], max(0, limit), bad_share, attempt)
    text, stop = stopped(answer.text, stops)
    if fault == "truncate":
        return _Done(text[: len(text) // 2], True)
    return _Done(broken(text) if fault == "broken_json" else text, answer.truncated and stop is None)


def _check(body: dict[str, Any]) -> None:
    """Raises:
    RefusedError: today's API refuses the request with 400.
    """
    if body.get("stream"):
        raise RefusedError(400, "stream: this stand-in does not stream", "unsupported_value", "stream")
    if not _fixed_sampling(body["model"]):
        return
    for name in ("temperature", "top_p"):
        if body.get(name) not in (None, 1, 1.0):
            message = f"Unsupported value: '{name}' does not support {body[name]} with this model. Only 1 is supported."
            raise RefusedError(400, message, "unsupported_value", name)
    if "max_tokens" in body:
        message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        raise RefusedError(400, message, "unsupported_parameter", "max_tokens")


def _fixed_sampling(model: str) -> bool:
    """gpt-5.6 and later, and gpt-6."""
    match = re.match(r"gpt-(\d+)(?:\.(\d+))?-", model)
    return bool(match) and (int(match[1]), int(match[2] or 0)) >= (5, 6)  # type: ignore[index]


def _reasoning(body: dict[str, Any], effort: str | None, limit: int) -> int:
    return 0 if effort == "none" or not _fixed_sampling(body["model"]) else min(_REASONING, limit)


def _response_input(body: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given or [])
    system = [body.get("instructions") or ""]
    system += [_text(m.get("content")) for m in messages if m.get("role") in ("system", "developer")]
    return "\n\n".join(filter(None, system)), [m for m in messages if m.get("role") not in ("system", "developer")]


def _text(content: Any) -> str:
    """The text of a message: a string, or parts of which some are text."""
    if isinstance(content, str):
        return content
    return "\n\n".join(str(part.get("text", "")) for part in content or [] if isinstance(part, dict))


def _input_tokens(messages: list[dict[str, Any]], schema: Any) -> int:
    texts = [_text(message.get("content")) for message in messages]
    return sum(engine.tokens(text) + 3 for text in texts if text) + (engine.tokens(repr(schema)) if schema else 0)


# ---------------------------------------------------------------- embeddings


def _embeddings(request: Request, fault: str, bad_share: float) -> Reply:
    body = request.json
    model, given = body["model"], body.get("input")
    inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not isinstance(inputs, list) or not inputs or len(inputs) > MAX_INPUTS:
        raise RefusedError(400, f"input must hold 1 to {MAX_INPUTS} texts", param="input")
    texts = [text if isinstance(text, str) else " ".join(map(str, text)) for text in inputs]
    counts = [engine.tokens(text) for text in texts]
    if not all(texts):
        raise RefusedError(400, "input cannot be an empty string", param="input")
    if max(counts) > MAX_INPUT_TOKENS:
        raise RefusedError(400, f"an input has {max(counts)} tokens, the most is {MAX_INPUT_TOKENS}", param="input")
    if sum(counts) > MAX_REQUEST_TOKENS:
        message = f"the inputs have {sum(counts)} tokens together, the most is {MAX_REQUEST_TOKENS}"
        raise RefusedError(400, message, "max_tokens_per_request", "input")
    full = _DIMENSIONS.get(model, 1536)
    dimensions = body.get("dimensions", full)
    if not isinstance(dimensions, int) or not 1 <= dimensions <= full:
        raise RefusedError(400, f"dimensions must be 1 to {full}, got {dimensions}", param="dimensions")
    if model.startswith("text-embedding-ada") and "dimensions" in body:
        raise RefusedError(400, "this model does not support specifying dimensions", param="dimensions")
    data = []
    for index, text in enumerate(texts):
        vector = embedding.vector(text, dimensions)
        value = embedding.base64_of(vector) if body.get("encoding_format") == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    result = {"object": "list", "data": data, "model": model, "usage": usage}
    return Reply(200, result, {}, model, sum(counts), 0, answered=True)


_POSTS = {
    "/v1/chat/completions": _chat,
    "/v1/responses": _responses,
    "/v1/responses/input_tokens": _count,
    "/v1/embeddings": _embeddings,
}


# ---------------------------------------------------------------- batches


def batches(request: Request, store: Batches, fault: str) -> Reply | None:
    """The answer to a request about files or batches; None when it is about something else."""
    what, _, rest = request.path.rstrip("/").removeprefix("/v1/").partition("/")
    identity, _, verb = rest.partition("/")
    if what not in ("files", "batches"):
        return None
    check_access(request)
    if what == "files":
        return _files(request, store, identity, verb)
    if request.method == "POST" and not identity:
        body = request.json
        rows = lines_of(_content(store, body["input_file_id"]))
        if wrong := [row for row in rows if row["url"] != body["endpoint"] or row["method"] != "POST"]:
            raise RefusedError(400, f"the url of {wrong[0]['custom_id']!r} is not the endpoint", param="input_file_id")
        models = {row["body"]["model"] for row in rows}
        if len(models) > 1:
            raise RefusedError(400, f"all requests of a batch go to one model, not {sorted(models)}")
        asked = [Asked(row["custom_id"], row["url"], row["body"]) for row in rows]
        facts = {"name": orjson.dumps(body.get("metadata")).decode(), "source": body["input_file_id"]}
        return Reply(200, _batch(store.create("openai", "batch_", "".join(models), asked, fault, **facts)))
    if request.method == "POST" and verb == "cancel":
        return Reply(200, _batch(store.cancel("openai", identity)))
    if request.method == "GET" and not identity:
        after, limit = request.query.get("after"), int(request.query.get("limit", 20))
        found = [_batch(batch) for batch in store.all("openai")]
        start = next((n + 1 for n, row in enumerate(found) if row["id"] == after), 0)
        return Reply(
            200, {"object": "list", "data": found[start : start + limit], "has_more": len(found) > start + limit}
        )
    if request.method == "GET" and not verb:
        return Reply(200, _batch(store.get("openai", identity)))
    return None


def _files(request: Request, store: Batches, identity: str, verb: str) -> Reply | None:
    if request.method == "POST" and not identity:
        fields = _multipart(request)
        if set(fields) != {"purpose", "file"} or fields["purpose"] != b"batch":
            raise RefusedError(400, f"expected a file with purpose batch, got {sorted(fields)}", param="purpose")
        lines_of(fields["file"])
        return Reply(200, _file(f"file-{store.keep(fields['file'])}", len(fields["file"])))
    if request.method == "GET" and verb == "content":
        return Reply(200, _content(store, identity), {"Content-Type": "application/octet-stream"})
    if request.method == "GET" and not verb:
        return Reply(200, _file(identity, len(_content(store, identity))))
    return None


def _multipart(request: Request) -> dict[str, bytes]:
    """The fields of a form by name."""
    mark = request.headers.get("content-type", "").partition("boundary=")[2].strip('"').encode()
    fields = {}
    for part in request.body.split(b"--" + mark)[1:-1] if mark else ():
        head, _, content = part.partition(b"\r\n\r\n")
        if name := re.search(rb'[ ;]name="([^"]*)"', head):
            fields[name[1].decode()] = content.removesuffix(b"\r\n")
    return fields


def _file(identity: str, size: int) -> dict[str, Any]:
    facts = {"id": identity, "object": "file", "bytes": size, "created_at": CREATED}
    return facts | {"filename": "batch.jsonl", "purpose": "batch", "status": "processed"}


def _content(store: Batches, identity: str) -> bytes:
    """An uploaded file, or the output (``file-out-``) or errors (``file-err-``) of a batch."""
    kind, _, batch = identity.removeprefix("file-").partition("-")
    if kind not in ("out", "err"):
        return store.uploaded(identity.removeprefix("file-"))
    rows = store.get("openai", batch).results()
    return jsonl([_line(row) for row in rows if (row["kind"] == "succeeded") == (kind == "out")])


def _line(row: dict[str, Any]) -> dict[str, Any]:
    answer, wrong = None, None
    if row["body"] is None:
        wrong = {"code": f"batch_{row['kind']}", "message": "This request was not answered in time."}
    else:
        answer = {"status_code": row["status"], "request_id": "r", "body": row["body"]}
    return {"id": f"batch_req_{row['custom_id']}", "custom_id": row["custom_id"], "response": answer, "error": wrong}


def _batch(batch: Batch) -> dict[str, Any]:
    others = batch.counts.total() - batch.counts["succeeded"]
    status, wrong = "completed" if batch.ended else "in_progress", None
    if batch.failed:
        status = "failed"
        code, said = "invalid_json_line", "This line is not parseable as valid JSON."
        if batch.failed == "batch_full":
            code, said = "token_limit_exceeded", f"Enqueued token limit reached for {batch.model}."
        wrong = {"object": "list", "data": [{"code": code, "message": said, "line": None, "param": None}]}
    elif batch.cancelled:
        status = "cancelled" if batch.ended else "cancelling"
    elif batch.ended and batch.counts["expired"]:
        status = "expired"
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "errors": wrong,
        "input_file_id": batch.source,
        "completion_window": "24h",
        "status": status,
        "output_file_id": f"file-out-{batch.id}" if batch.ended and batch.counts["succeeded"] else None,
        "error_file_id": f"file-err-{batch.id}" if batch.ended and others else None,
        "created_at": int(batch.created),
        "request_counts": {"total": batch.total, "completed": batch.counts["succeeded"], "failed": others},
        "metadata": orjson.loads(batch.name),
    }
