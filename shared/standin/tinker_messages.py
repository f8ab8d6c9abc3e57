"""Tinker's messages, read and written: what a request of the SDK asks for, what an answer looks like on the wire."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

from shared.standin.tinker_engine import Adam, Datum, Lora, Sampled, Sampling
from shared.standin.tinker_store import KINDS, NAME, Place
from shared.standin.wire import RETIRED, RefusedError, Reply

MODEL = "Qwen/Qwen3-8B"
RETIRED_MODEL = "Qwen/Qwen3-8B-Base"
SAMPLING_MODEL = "Qwen/Qwen3-30B-A3B-Instruct-2507"
OFFERED = {MODEL: (True, True), RETIRED_MODEL: (False, False), SAMPLING_MODEL: (False, True)}
"""Whether each model can be trained and sampled from."""
MAX_RANK = 32
SHORTEST_TTL_S, LONGEST_TTL_S = 3600, 10 * 365 * 86400

# ---------------------------------------------------------------- reading requests


def check_trainable(name: str) -> None:
    """Let only a model pass that can be trained.

    Raises:
        RefusedError: 404 for an unknown or retired one, 400 for one that can be sampled from alone.
    """
    if name not in OFFERED or name.startswith(RETIRED) or name == RETIRED_MODEL:
        what = "was retired" if name == RETIRED_MODEL or name.startswith(RETIRED) else "is not offered"
        raise RefusedError(404, f"base_model {name!r} {what}; see get_server_capabilities")
    if not OFFERED[name][0]:
        raise RefusedError(400, f"base_model {name!r} cannot be trained; see get_server_capabilities")


def lora_of(config: dict[str, Any] | None, model: str) -> Lora:
    """What a training run is to adapt; without a seed it is 0.

    Raises:
        RefusedError: 400 or 422, it cannot be adapted so.
    """
    if not config:
        raise RefusedError(400, "lora_config: this service trains LoRA adapters only")
    rank = config.get("rank")
    if not isinstance(rank, int) or rank < 1:
        raise RefusedError(422, f"lora_config.rank must be a whole number of 1 or more, got {rank!r}")
    if rank > MAX_RANK:
        raise RefusedError(400, f"Lora_config.rank {rank} exceeds max LoRA rank {MAX_RANK} for model {model}")
    parts = {part: bool(config.get(f"train_{part}", True)) for part in ("unembed", "mlp", "attn")}
    if not any(parts.values()):
        raise RefusedError(400, "lora_config: at least one of train_unembed, train_mlp, train_attn must be true")
    return Lora(rank, int(config.get("seed") or 0), **parts)


def adam_of(params: Any) -> Adam:
    """The parameters of a step.

    Raises:
        RefusedError: 400 for another optimizer, 422 for values out of range.
    """
    if not isinstance(params, dict):
        raise RefusedError(400, "adam_params: Field required; this stand-in has no other optimizer")
    adam = Adam(**{name: float(params[name]) for name in Adam._fields if params.get(name) is not None})
    fine = adam.learning_rate >= 0 and 0 <= adam.beta1 < 1 and 0 <= adam.beta2 < 1 and adam.eps >= 0
    if not fine or not all(map(math.isfinite, adam)):
        raise RefusedError(422, f"adam_params: a value is out of its range: {adam._asdict()}")
    return adam


def _dense(place: int, datum: Any, name: str, dtype: str, code: int) -> Any:
    import numpy as np

    tensor = datum.loss_fn_inputs.get(name)
    if tensor is None or tensor.WhichOneof("encoding") == "sparse_csr" or tensor.dtype != code:
        what = "is missing" if tensor is None else "must be a dense tensor of int64 (tokens) or float32 (weights)"
        raise RefusedError(400, f"data[{place}].loss_fn_inputs[{name!r}] {what}")
    return np.frombuffer(tensor.dense, dtype)


def place_of(run: str, kind: str, name: str) -> Place:
    """The place of a checkpoint.

    Raises:
        RefusedError: 400, it cannot have that name.
    """
    if kind not in KINDS or not NAME.fullmatch(name):
        raise RefusedError(400, f"{kind}/{name}: a name has letters, digits, '.', '_' and '-', at most 128")
    return Place(run, kind, name)


def expiry_of(body: dict[str, Any]) -> float | None:
    """When something with this ``ttl_seconds`` expires, in seconds since 1970; None = never.

    Raises:
        RefusedError: 400, it is too short or too long.
    """
    ttl = body.get("ttl_seconds")
    if ttl is None:
        return None
    if not isinstance(ttl, int) or not SHORTEST_TTL_S <= ttl <= LONGEST_TTL_S:
        raise RefusedError(400, f"ttl_seconds must be {SHORTEST_TTL_S} to {LONGEST_TTL_S}, got {ttl!r}")
    return time.time() + ttl


def prompt_of(prompt: dict[str, Any]) -> list[int]:
    """The tokens of a prompt.

    Raises:
        RefusedError: 400, there are none, or it is not text.
    """
    chunks = prompt["chunks"]
    if any(chunk.get("type") != "encoded_text" for chunk in chunks):
        raise RefusedError(400, "prompt: this stand-in reads text only")
    tokens = [int(token) for chunk in chunks for token in chunk["tokens"]]
    if not tokens:
        raise RefusedError(400, "prompt: at least one token is required")
    return tokens


def sampling_of(params: dict[str, Any], most: int) -> Sampling:
    """How to sample, without the seed; ``most``: tokens when the request sets no limit."""
    stop = params.get("stop")
    stops = None if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    limit = params.get("max_tokens")
    return Sampling(
        max_tokens=most if limit is None else int(limit),
        temperature=float(params.get("temperature", 1.0)),
        top_k=int(params.get("top_k", -1)),
        top_p=float(params.get("top_p", 1.0)),
        stop=stops,
    )


def seed_of(text: str, place: int) -> int:
    """A seed for one of several samples."""
    return int.from_bytes(hashlib.sha256(f"{text} {place}".encode()).digest()[:8], "big")


def data_of(asked: Any, max_length: int, vocabulary: int) -> list[Datum]:
    """The sequences of a protobuf ``ForwardBackwardRequest``.

    Raises:
        RefusedError: 400, it cannot be computed.
    """
    if asked.loss_fn != "cross_entropy":
        raise RefusedError(400, f"loss_fn {asked.loss_fn!r}: this stand-in computes cross_entropy only")
    if not asked.data:
        raise RefusedError(400, "data: at least one datum is required")
    return [_datum(place, datum, max_length, vocabulary) for place, datum in enumerate(asked.data)]


def _datum(place: int, datum: Any, max_length: int, vocabulary: int) -> Datum:
    import numpy as np

    if any(chunk.WhichOneof("chunk") != "encoded_text" for chunk in datum.model_input):
        raise RefusedError(400, f"data[{place}].model_input: this stand-in reads text only")
    tokens = np.frombuffer(b"".join(chunk.encoded_text.tokens for chunk in datum.model_input), "<i4")
    targets = _dense(place, datum, "target_tokens", "<i8", 2)
    weights = _dense(place, datum, "weights", "<f4", 1)
    if not len(tokens):
        raise RefusedError(400, f"data[{place}].model_input is empty")
    if len(tokens) > max_length:
        raise RefusedError(
            400,
            f"data[{place}] has {len(tokens)} tokens, which exceeds the maximum context length "
            f"{max_length} of model {MODEL}",
        )
    if not len(tokens) == len(targets) == len(weights):
        raise RefusedError(
            400,
            f"data[{place}]: {len(tokens)} tokens of model_input, {len(targets)} target_tokens and {len(weights)} "
            "weights must be equally many",
        )
    for name, ids in (("model_input", tokens), ("target_tokens", targets)):
        check_ids(f"data[{place}].{name}", int(ids.min()), int(ids.max()), vocabulary)
    if not np.isfinite(weights).all():
        raise RefusedError(400, f"data[{place}].weights are not all finite")
    return Datum(tokens, targets, weights)


def check_ids(what: str, lowest: int, highest: int, vocabulary: int) -> None:
    """Let only ids of tokens pass.

    Raises:
        RefusedError: 400, one is none.
    """
    if lowest < 0 or highest >= vocabulary:
        bad = lowest if lowest < 0 else highest
        raise RefusedError(400, f"{what}: there is no token {bad}, the vocabulary has {vocabulary}")


# ---------------------------------------------------------------- writing answers


def listed(place: Place, facts: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as it is listed."""
    expires = facts.get("expires")
    return {
        "checkpoint_id": f"{place.kind}/{place.name}",
        "checkpoint_type": KINDS[place.kind],
        "time": time_of(facts["saved"]),
        "tinker_path": str(place),
        "size_bytes": facts["size"],
        "public": False,
        "user_metadata": facts.get("user_metadata"),
        "expires_at": None if expires is None else time_of(expires),
    }


def when(checkpoint: dict[str, Any]) -> str:
    """When a listed checkpoint was saved; sorts by time."""
    return str(checkpoint["time"])


def time_of(seconds: float) -> str:
    """RFC 3339, of seconds since 1970; always equally long."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def denied(code: str, message: str) -> Reply:
    """As storage services say it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>\n'
    return Reply(403, body.encode(), {"Content-Type": "application/xml"})


def forward_output(logprobs: Sequence[Any], loss: float) -> bytes:
    """A protobuf ``ForwardBackwardOutput``; ``logprobs`` is a float32 array for each datum."""
    import numpy as np
    from tinker.proto import tinker_public_pb2 as messages

    output = messages.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    record = output.loss_fn_outputs.add(type_tag="ArrayRecord")
    record.num_datums = len(logprobs)
    tensor = record.fields["logprobs"]
    tensor.data = b"".join(row.astype("<f4").tobytes() for row in logprobs)
    tensor.offsets = np.cumsum([0, *(4 * len(row) for row in logprobs)]).astype("<i8").tobytes()
    tensor.dtype = messages.DTYPE_FLOAT32
    output.metrics["loss:sum"] = loss
    return cast(bytes, output.SerializeToString())


def sample_output(sequences: Sequence[Sampled], prompt_logprobs: Any) -> bytes:
    """A protobuf ``SampleResponse``; ``prompt_logprobs`` is a float32 array, or None when nobody asked."""
    import numpy as np
    from tinker.proto import tinker_public_pb2 as messages

    output = messages.SampleResponse()
    for found in sequences:
        sequence = output.sequences.add()
        sequence.tokens = np.array(found.tokens, "<i4").tobytes()
        sequence.logprobs = np.array(found.logprobs, "<f4").tobytes()
        sequence.stop_reason = messages.STOP_REASON_STOP if found.stopped else messages.STOP_REASON_LENGTH
    if prompt_logprobs is not None:
        output.prompt_logprobs = prompt_logprobs.astype("<f4").tobytes()
    return cast(bytes, output.SerializeToString())
