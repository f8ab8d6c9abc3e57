"""The Tinker API: sessions, training, checkpoints, exports and sampling. Shapes as the real SDK (0.38) reads them.

Behind it a small model is trained for real (:mod:`shared.standin.tinker_engine`), under the name of one of the
service's (:data:`~shared.standin.tinker_messages.MODEL`); what must outlive the process lies in a directory
(:mod:`shared.standin.tinker_store`).

- Requests of a training run are worked on in the order of their ``seq_id``, however they arrive, in one thread; a
  request that comes again (a retry) is the same request. What they lead to is asked for with ``retrieve_future``,
  which answers within :data:`POLL_S` seconds, and with ``try_again`` until it is done.
- The same requests lead to the same bytes of an export, whatever the ids. A run without a seed has seed 0.
- A saved state holds adapter, optimizer and number of steps; not the gradients that no step has used yet.
- Keys ``bad-key`` and ``tml-bad-key`` are refused. Without MLX, the SDK or weights everything is 503.
- Offered are one model to train, one to sample from alone, and one that has been retired
  (:data:`~shared.standin.tinker_messages.OFFERED`). The rank is 32 at most.
- The output matrix can be adapted (``train_unembed``), as there, though the small model's is its token embedding: such
  an export has ``unembed_tokens``, and :mod:`shared.adapters` refuses it for this base.
- Not here: losses other than cross_entropy, optimizers other than AdamW, images, top-k log-probabilities, encrypted
  exports, publishing. They are refused, with 400 or 404.

Faults on demand: :mod:`shared.standin.faults`, for example
``STANDIN_FAULTS="429@forward_backward=2-3,paused_capacity@create_model=1,link_expired@external_weights_urls=1"``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode

from shared.standin.faults import Faults
from shared.standin.tinker_engine import (
    Adapter,
    Engine,
    EngineError,
    Lora,
    Trainee,
    adapter_from,
    arrays_of,
    peft_files,
    trainee_from,
)
from shared.standin.tinker_messages import (
    MODEL,
    OFFERED,
    adam_of,
    check_ids,
    check_trainable,
    data_of,
    denied,
    expiry_of,
    forward_output,
    listed,
    lora_of,
    place_of,
    prompt_of,
    sample_output,
    sampling_of,
    seed_of,
    time_of,
    when,
)
from shared.standin.tinker_store import Place, Store
from shared.standin.wire import BAD_KEY, RefusedError, Reply, Request

PREFIX = "/api/v1/"
FILES = f"{PREFIX}external_weights/"
PROTO = "application/x-protobuf"
POLL_S = 20.0
"""How long a question for a result waits for it; the SDK gives up after 45 s."""
PAUSED_POLL_S = 0.5
"""The same while the queue is paused, so that the client soon knows."""
GAP_S = 30.0
"""How long a request waits for the one before it."""
MOST_FUTURES = 4096
TINY = Path(__file__).resolve().parent.parent.parent / "models" / "tiny"
_QUIET = ("retrieve_future", "session_heartbeat", "telemetry", "config", "dynamic_config", "healthz", "finish")
_OF_FUTURES = ("future_failed", "future_slow", "paused_capacity", "paused_rate_limit")
_ID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


# ---------------------------------------------------------------- what the server asks of a protocol


def error(request: Request, status: int, message: str, kind: str = "", param: str | None = None) -> Reply:
    """An error in this API's shape. ``kind="quota"`` is an account without credit, 402 here."""
    status = 402 if kind == "quota" else status
    return Reply(status, {"detail": message})


def headers(request: Request, limit: int, remaining: int, reset: str) -> dict[str, str]:
    """What every answer carries: nothing."""
    return {}


def asked(request: Request) -> tuple[str, bytes]:
    """Path and body without what differs from run to run, for the faults."""
    return _ID.sub(b"", unquote(request.path).encode()).decode(), _ID.sub(b"", request.body)


def counts(request: Request) -> bool:
    """Whether a request counts for the limit on requests a second; asking for results does not."""
    return request.path.rpartition("/")[2] not in _QUIET


# ---------------------------------------------------------------- what it remembers

Answer = dict[str, Any] | bytes
"""Of a future: JSON, or a protobuf message. ``{"error": ..., "category": ...}`` is a failure."""


@dataclass
class Future:
    """What a request leads to.

    Attributes:
        done: its answer, once there is one.
        ready_at: not before then (monotonic seconds).
        state: of the queue until then.
        output_tokens: for the log; known when it is done.
        told: whether somebody has the answer.
    """

    done: asyncio.Future[Answer]
    ready_at: float
    state: str
    output_tokens: int = 0
    told: bool = False


@dataclass
class Run:
    """A training run.

    Attributes:
        turn: ``seq_id`` of the request that is worked on next.
        waiting: requests that came before their turn, by ``seq_id``.
        known: what was answered to each request, for when it comes again.
    """

    id: str
    trainee: Trainee
    turn: int = 1
    waiting: dict[int, Callable[[], None]] = field(default_factory=dict)
    known: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Sampler:
    """A sampling session. ``adapter`` is made when it is first needed; None is the base model."""

    path: str | None
    adapter: Callable[[], Adapter | None]


class Tinker:
    """The service.

    Args:
        state: directory of what outlives the process; ``""`` = a temporary one.
        faults: of these, how long they take.
        latency_s: seconds added to each future.
        model: directory of the model behind it.
    """

    def __init__(self, state: str, faults: Faults, latency_s: float = 0.0, model: Path = TINY) -> None:
        self.faults, self.latency_s = faults, latency_s
        self.store, self.engine = Store(state), Engine(model)
        self.thread = ThreadPoolExecutor(1, "tinker")
        self.secret = secrets.token_bytes(32)
        self.sessions: dict[str, bool] = {}  # whether each has ended
        self.runs: dict[str, Run] = {}
        self.samplers: dict[str, Sampler] = {}
        self.futures: OrderedDict[str, Future] = OrderedDict()
        self.ready = self.warned = False

    async def handle(self, request: Request, fault: str) -> Reply:
        """The answer to one request; ``fault`` is a fault of its future, link or file."""
        parts = [unquote(part) for part in request.path.removeprefix(PREFIX).strip("/").split("/")]
        if parts == ["healthz"]:
            return Reply(200, {"status": "ok"})
        if request.path.startswith(FILES) and request.method == "GET":
            return self._file(request, parts[1:], fault)
        if request.key.removeprefix("tml-") in ("", BAD_KEY):
            raise RefusedError(401, "the API key is missing or not valid")
        if request.method == "POST" and len(parts) <= 2 and "/".join(parts) in _PLAIN:
            return Reply(200, _PLAIN["/".join(parts)])
        if not self.ready:
            self._check_engine()
        if request.method == "POST" and len(parts) == 1 and parts[0] in _POSTS:
            return await _POSTS[parts[0]](self, request, fault)
        match request.method, parts:
            case "GET", ["get_server_capabilities"]:
                return Reply(200, {"supported_models": [self._offer(name) for name in OFFERED]})
            case "POST", ["sessions", session, "finish"]:
                self._session(session)
                return self._finish(session)
            case "GET", ["samplers", sampler]:
                found = self._sampler(sampler)
                return Reply(200, {"sampler_id": sampler, "base_model": MODEL, "model_path": found.path})
            case "GET", ["training_runs"]:
                return Reply(200, self._page(request, "training_runs", [self._run_facts(r) for r in self.store.runs()]))
            case "GET", ["training_runs", run]:
                return Reply(200, self._run_facts(run))
            case "GET", ["training_runs", run, "checkpoints"]:
                self.store.run(run)
                return Reply(200, {"checkpoints": [listed(*each) for each in self.store.checkpoints(run)]})
            case "GET", ["checkpoints"]:
                every = [listed(*each) for each in self.store.checkpoints()]
                return Reply(200, self._page(request, "checkpoints", every))
            case "GET", ["training_runs", run, "checkpoints", "external_weights", name, "external_weights_urls"]:
                return self._urls(request, place_of(run, "external_weights", name), fault)
            case "DELETE", ["training_runs", run, "checkpoints", kind, name]:
                self.store.delete(place_of(run, kind, name))
                return Reply(200, {})
            case "PUT", ["training_runs", run, "checkpoints", kind, name, "ttl"]:
                self.store.expire(place_of(run, kind, name), expiry_of(request.json))
                return Reply(200, {})
        raise RefusedError(404, f"{request.method} {request.path} is not served here")

    def _check_engine(self) -> None:
        """Raises:
        RefusedError: 503, nothing can be computed here.
        """
        if missing := self.engine.missing:
            if not self.warned:
                print(f"the stand-in for Tinker answers 503: {missing}", file=sys.stderr)
            self.warned = True
            raise RefusedError(503, f"the stand-in cannot train: {missing}")
        self.ready = True

    def _offer(self, name: str) -> dict[str, Any]:
        trainable, sampleable = OFFERED[name]
        return {
            "model_name": name,
            "max_context_length": self.engine.max_length,
            "trainable": trainable,
            "sampleable": sampleable,
        }

    # ------------------------------------------------------------ sessions

    async def _create_session(self, request: Request, fault: str) -> Reply:
        session = str(uuid.uuid4())
        self.sessions[session] = False
        self.thread.submit(self.engine.warm)
        return Reply(200, {"type": "create_session", "session_id": session})

    async def _heartbeat(self, request: Request, fault: str) -> Reply:
        self._session(str(request.json["session_id"]))
        return Reply(200, {"type": "session_heartbeat"})

    def _session(self, session: str) -> None:
        """Let only a session pass that is there.

        Raises:
            RefusedError: 404 for an unknown one, 410 for one that has ended.
        """
        ended = self.sessions.get(session)
        if ended is None:
            raise RefusedError(404, f"there is no session {session!r}; sessions end with the stand-in that has them")
        if ended:
            raise RefusedError(410, f"the session {session} has ended")

    def _finish(self, session: str) -> Reply:
        self.sessions[session] = True
        owned: tuple[dict[str, Any], ...] = (self.runs, self.samplers)
        for of in owned:
            for name in list(of):  # at once: the thread may be adding to it
                if name.startswith(f"{session}:"):
                    del of[name]
        return Reply(200, {})

    # ------------------------------------------------------------ futures

    def _promise(self, request_id: str, fault: str) -> Future:
        """A new future, with its fault but without its work."""
        now = time.monotonic()
        faults, wait, state = self.faults, self.latency_s, "active"
        if fault == "future_slow":
            wait += faults.slow_s
        elif fault in ("paused_capacity", "paused_rate_limit"):
            wait, state = wait + faults.pause_s, fault
        future = Future(asyncio.get_running_loop().create_future(), now + wait, state)
        self.futures[request_id] = future
        if len(self.futures) > MOST_FUTURES:
            self.futures.popitem(last=False)
        return future

    def _work(self, future: Future, fault: str, work: Callable[[], Answer]) -> None:
        """Give a future's work to the thread; it is done in the order of these calls."""
        if fault == "future_failed":
            future.done.set_result(_failed("the stand-in was asked for a failure", "server"))
            return
        loop = asyncio.get_running_loop()

        def done(running: asyncio.Future[Answer]) -> None:
            if not future.done.done():
                future.done.set_result(running.result())

        loop.run_in_executor(self.thread, _answered, work).add_done_callback(done)

    async def _retrieve(self, request: Request, fault: str) -> Reply:
        request_id = str(request.json["request_id"])
        future = self.futures.get(request_id)
        if future is None:
            raise RefusedError(404, f"there is no request {request_id!r}; results end with the stand-in that has them")
        now = time.monotonic()
        until = now + (PAUSED_POLL_S if future.state != "active" and now < future.ready_at else POLL_S)
        await asyncio.sleep(max(0.0, min(future.ready_at, until) - now))
        if (now := time.monotonic()) >= future.ready_at:
            await asyncio.wait([future.done], timeout=max(0.0, until - now))
        if now < future.ready_at or not future.done.done():
            state = future.state if now < future.ready_at else "active"
            return Reply(200, {"type": "try_again", "request_id": request_id, "queue_state": state})
        answer = future.done.result()
        failed = isinstance(answer, dict) and "error" in answer
        first, future.told = not future.told, True
        reply = Reply(200, answer, {"Content-Type": PROTO} if isinstance(answer, bytes) else {}, MODEL)
        if future.output_tokens and first and not failed:
            reply.output_tokens, reply.answered = future.output_tokens, True
        return reply

    # ------------------------------------------------------------ training runs

    def _run(self, run: str) -> Run:
        """Raises:
        RefusedError: 404, this process has no such run.
        """
        if run not in self.runs:
            raise RefusedError(404, f"there is no model {run!r}; load a saved state into a new one")
        return self.runs[run]

    def _in_turn(self, run: Run, seq_id: Any, fault: str, work: Callable[[Trainee], Answer], tokens: int = 0) -> Reply:
        """Take a request of a run; it is worked on when all before it were."""
        if not isinstance(seq_id, int) or seq_id < 1:
            raise RefusedError(422, f"seq_id must be 1 or more, got {seq_id!r}")
        if seq_id in run.known:  # a retry: the answer to the first try was lost
            return Reply(200, run.known[seq_id])
        request_id = f"{run.id}:{seq_id}"
        future = self._promise(request_id, fault)

        def begin() -> None:
            if not future.done.done():
                self._work(future, fault, lambda: work(run.trainee))

        run.waiting[seq_id] = begin
        self._go_on(run)
        if seq_id in run.waiting:
            asyncio.get_running_loop().call_later(GAP_S, self._give_up, run, seq_id, future)
        run.known[seq_id] = {"request_id": request_id}
        answered = tokens > 0  # it costs from here on
        return Reply(
            200, run.known[seq_id], model=MODEL, input_tokens=tokens, answered=answered, fault=_of_future(fault)
        )

    @staticmethod
    def _go_on(run: Run) -> None:
        while run.turn in run.waiting:
            run.waiting.pop(run.turn)()
            run.turn += 1

    def _give_up(self, run: Run, seq_id: int, future: Future) -> None:
        """Fail a request whose turn has not come because one before it never did."""
        if seq_id in run.waiting:
            future.done.set_result(_failed(f"seq_id {run.turn} has not come before {seq_id}", "user"))

    def _refused(self, run: Run, seq_id: Any, why: RefusedError) -> RefusedError:
        """A refused request has had its turn."""
        if isinstance(seq_id, int) and seq_id == run.turn:
            run.turn += 1
            self._go_on(run)
        elif isinstance(seq_id, int) and seq_id > run.turn:
            run.waiting[seq_id] = lambda: None
        return why

    def _begin(self, body: dict[str, Any], answer: dict[str, Any], fault: str, make: Callable[[], Trainee]) -> Reply:
        """A new run; ``make`` is its first work, ``answer`` what is said when it is done."""
        session = str(body["session_id"])
        self._session(session)
        run = f"{session}:train:{int(body['model_seq_id'])}"
        request_id = f"{run}:0"
        if request_id in self.futures:
            return Reply(200, {"request_id": request_id})

        def work() -> Answer:
            trainee = make()
            lora = trainee.adapter.lora
            facts = {"base_model": MODEL, "lora": lora._asdict(), "begun": time.time()}
            self.store.keep_run(run, facts | {"user_metadata": body.get("user_metadata")})
            self.runs[run] = Run(run, trainee)
            return answer | {"model_id": run}

        self._work(self._promise(request_id, fault), fault, work)
        return Reply(200, {"request_id": request_id}, model=MODEL, fault=_of_future(fault))

    async def _create_model(self, request: Request, fault: str) -> Reply:
        body = request.json
        name = str(body["base_model"])
        check_trainable(name)
        if (body.get("optimizer_config") or {}).get("type", "adamw") != "adamw":
            raise RefusedError(400, "optimizer_config.type: this stand-in has adamw only")
        lora = lora_of(body.get("lora_config"), name)
        return self._begin(body, {"type": "create_model"}, fault, lambda: self.engine.new(lora))

    async def _load_weights(self, request: Request, fault: str) -> Reply:
        body = request.json
        place, optimizer = Place.parse(str(body["path"])), bool(body["optimizer"])
        if place.kind != "weights":
            raise RefusedError(400, f"{place} is no saved state: only what save_weights wrote can be trained on")
        if body.get("base_model") not in (None, MODEL):
            raise RefusedError(400, f"{body['base_model']!r} does not fit {place}, which belongs to {MODEL!r}")

        def make() -> Trainee:
            facts, arrays = self.store.load(place)
            return trainee_from(Lora(**facts["lora"]), arrays, facts["steps"], optimizer=optimizer)

        if body.get("session_id") is None:  # a load into a run that is there already
            run = self._run(str(body["model_id"]))

            def replace(_: Trainee) -> Answer:
                run.trainee = make()
                return {"type": "load_weights", "path": str(place), "model_id": run.id}

            return self._in_turn(run, body.get("seq_id"), fault, replace)
        return self._begin(body, {"type": "load_weights", "path": str(place)}, fault, make)

    async def _get_info(self, request: Request, fault: str) -> Reply:
        run = self._run(str(request.json["model_id"]))
        data = {"arch": str(self.engine.config["model_type"]), "model_name": MODEL, "tokenizer_id": MODEL}
        facts = {"model_id": run.id, "model_data": data, "is_lora": True, "lora_rank": run.trainee.adapter.lora.rank}
        return Reply(200, facts | {"type": "get_info", "model_name": MODEL})

    async def _forward_backward(self, request: Request, fault: str) -> Reply:
        from tinker.proto import tinker_public_pb2 as messages

        if request.headers.get("content-encoding"):
            raise RefusedError(400, "this stand-in did not ask for compressed requests")
        asked = messages.ForwardBackwardRequest()
        asked.ParseFromString(request.body)
        run, backward = self._run(asked.model_id), not asked.forward_only
        try:
            data = data_of(asked, self.engine.max_length, self.engine.vocabulary)
        except RefusedError as why:
            raise self._refused(run, asked.seq_id, why) from None

        def work(trainee: Trainee) -> Answer:
            logprobs, loss = self.engine.forward(trainee, data, backward=backward)
            return forward_output(logprobs, loss)

        return self._in_turn(run, asked.seq_id, fault, work, sum(len(datum.tokens) for datum in data))

    async def _optim_step(self, request: Request, fault: str) -> Reply:
        body = request.json
        run = self._run(str(body["model_id"]))
        try:
            adam = adam_of(body.get("adam_params"))
        except RefusedError as why:
            raise self._refused(run, body.get("seq_id"), why) from None

        def work(trainee: Trainee) -> Answer:
            return {"metrics": {"grad_norm": self.engine.step(trainee, adam), "step": float(trainee.steps)}}

        return self._in_turn(run, body.get("seq_id"), fault, work)

    # ------------------------------------------------------------ checkpoints

    async def _save(self, request: Request, fault: str) -> Reply:
        """``save_weights``, ``save_weights_for_sampler`` and ``save_weights_external``."""
        body, operation = request.json, request.path.rpartition("/")[2]
        kind = {"save_weights": "weights", "save_weights_for_sampler": "sampler_weights"}.get(operation)
        run = self._run(str(body["model_id"]))
        try:
            place = place_of(run.id, kind or "external_weights", str(body["path"])) if body.get("path") else None
            if place is None and (kind != "sampler_weights" or body.get("sampling_session_seq_id") is None):
                raise RefusedError(422, "path: Field required")
            if body.get("age_encryption_recipients"):
                raise RefusedError(400, "age_encryption_recipients: this stand-in does not encrypt")
            expires = expiry_of(body)
        except RefusedError as why:
            raise self._refused(run, body.get("seq_id"), why) from None

        def sampler(trainee: Trainee) -> Answer:
            session = f"{run.id.partition(':')[0]}:sample:{int(body['sampling_session_seq_id'])}"
            adapter = trainee.adapter
            self.samplers[session] = Sampler(None, lambda: adapter)
            return {"type": operation, "path": None, "sampling_session_id": session}

        def checkpoint(trainee: Trainee) -> Answer:
            assert place is not None
            arrays, lora = arrays_of(trainee, optimizer=place.kind == "weights"), trainee.adapter.lora
            facts = {"base_model": MODEL, "lora": lora._asdict(), "steps": trainee.steps, "expires": expires}
            facts |= {"saved": time.time(), "user_metadata": body.get("user_metadata")}
            if place.kind == "external_weights":
                facts["size"] = sum(map(len, peft_files(lora, arrays, MODEL).values()))
            self.store.save(place, arrays, facts, overwrite=bool(body.get("overwrite")))
            return {"type": operation, "path": str(place)}

        return self._in_turn(run, body.get("seq_id"), fault, checkpoint if place else sampler)

    async def _weights_info(self, request: Request, fault: str) -> Reply:
        facts = self.store.facts(Place.parse(str(request.json["tinker_path"])))
        lora = Lora(**facts["lora"])
        trained = {"train_unembed": lora.unembed, "train_mlp": lora.mlp, "train_attn": lora.attn}
        return Reply(200, {"base_model": facts["base_model"], "is_lora": True, "lora_rank": lora.rank} | trained)

    def _run_facts(self, run: str) -> dict[str, Any]:
        facts = self.store.run(run)
        found = [listed(*each) for each in self.store.checkpoints(run)]
        last = {each["checkpoint_type"]: each for each in sorted(found, key=when)}
        return {
            "training_run_id": run,
            "base_model": facts["base_model"],
            "model_owner": "standin",
            "is_lora": True,
            "lora_rank": facts["lora"]["rank"],
            "last_request_time": max([time_of(facts["begun"]), *map(when, found)]),
            "last_checkpoint": last.get("training"),
            "last_sampler_checkpoint": last.get("sampler"),
            "user_metadata": facts.get("user_metadata"),
        }

    @staticmethod
    def _page(request: Request, name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
        limit, offset = int(request.query.get("limit", 20)), int(request.query.get("offset", 0))
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return {name: found[offset : offset + limit], "cursor": cursor}

    # ------------------------------------------------------------ exports

    def _urls(self, request: Request, place: Place, fault: str) -> Reply:
        """A signed link for each file of an export."""
        files = ["adapter_config.json", "adapter_model.safetensors"]
        self.store.facts(place)
        expires = int(time.time() + (-1 if fault == "link_expired" else math.ceil(self.faults.link_s)))
        if fault == "path_escape":
            files.append("../escaped.safetensors")
        start = f"http://{request.headers.get('Host', '')}{FILES}{quote(place.run)}/{place.name}"
        urls = {
            name: f"{start}/{quote(name, safe='')}?"
            + urlencode({"expires": expires, "signature": self._signature(place, name, str(expires))})
            for name in files
        }
        hit = fault if fault in ("link_expired", "path_escape") else None
        return Reply(200, {"urls": urls, "expires": time_of(expires)}, fault=hit)

    def _signature(self, place: Place, name: str, expires: str) -> str:
        return hmac.new(self.secret, f"{place}\0{name}\0{expires}".encode(), hashlib.sha256).hexdigest()

    def _file(self, request: Request, parts: list[str], fault: str) -> Reply:
        """A file of an export, whoever has its link; from a byte on when asked for that."""
        if len(parts) < 3:
            raise RefusedError(404, "there is no such file")
        place, name = place_of(parts[0], "external_weights", parts[1]), "/".join(parts[2:])
        expires, signature = request.query.get("expires", ""), request.query.get("signature", "")
        if not hmac.compare_digest(signature, self._signature(place, name, expires)):
            return denied("SignatureDoesNotMatch", "The signature of the link does not match.")
        if int(expires) <= time.time():
            return denied("AccessDenied", f"Request has expired: the link was good until {time_of(float(expires))}.")
        facts, arrays = self.store.load(place)
        files = peft_files(Lora(**facts["lora"]), arrays, MODEL)
        content = files.get(name, files["adapter_model.safetensors"])
        kind = "application/json" if name.endswith(".json") else "application/octet-stream"
        about = {"Content-Type": kind, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        hit = fault if fault == "cut" else None
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if start is None:
            return Reply(200, content, about, fault=hit)
        first, size = int(start[1]), len(content)
        if first >= size:
            return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
        return Reply(206, content[first:], about | {"Content-Range": f"bytes {first}-{size - 1}/{size}"}, fault=hit)

    # ------------------------------------------------------------ sampling

    async def _create_sampling_session(self, request: Request, fault: str) -> Reply:
        body = request.json
        session = str(body["session_id"])
        self._session(session)
        path, base = body.get("model_path"), body.get("base_model")
        if path is None:
            if base != MODEL:
                raise RefusedError(400, f"this stand-in has no weights of {base!r}; it samples from {MODEL!r}")
            sampler = Sampler(None, lambda: None)
        else:
            place = Place.parse(str(path))
            if place.kind != "sampler_weights":
                raise RefusedError(
                    400, f"{place} is no sampler checkpoint: sample from what save_weights_for_sampler wrote"
                )
            facts, arrays = self.store.load(place)
            adapters: list[Adapter] = []

            def adapter() -> Adapter:  # in the thread: MLX is not for this one
                if not adapters:
                    adapters.append(adapter_from(Lora(**facts["lora"]), arrays))
                return adapters[0]

            sampler = Sampler(str(place), adapter)
        name = f"{session}:sample:{int(body['sampling_session_seq_id'])}"
        self.samplers[name] = sampler
        return Reply(200, {"type": "create_sampling_session", "sampling_session_id": name})

    def _sampler(self, session: str) -> Sampler:
        if session not in self.samplers:
            raise RefusedError(404, f"there is no sampling session {session!r}")
        return self.samplers[session]

    async def _sample(self, request: Request, fault: str) -> Reply:
        body = request.json
        session = str(body["sampling_session_id"])
        sampler, count = self._sampler(session), int(body.get("num_samples", 1))
        prompt = prompt_of(body["prompt"])
        check_ids("prompt", min(prompt), max(prompt), self.engine.vocabulary)
        if any(body.get(key) for key in _NOT_SAMPLED):
            raise RefusedError(400, f"this stand-in has none of {', '.join(_NOT_SAMPLED)}")
        how = sampling_of(body.get("sampling_params") or {}, self.engine.max_length - len(prompt))
        if how.max_tokens < 0 or len(prompt) + how.max_tokens > self.engine.max_length:
            raise RefusedError(
                400,
                f"the prompt has {len(prompt)} tokens, and with max_tokens {how.max_tokens} that exceeds the maximum "
                f"context length {self.engine.max_length} of model {MODEL}",
            )
        # Without a seed equal questions of a session differ, but a second run of all of them gets the same answers.
        seed = body["sampling_params"].get("seed")
        seed = f"{prompt} {body.get('seq_id')}" if seed is None else f"{prompt} seed {seed}"
        request_id = f"{session}:{body.get('seq_id')}"
        ids = [f"{request_id}:{place}" for place in range(count)]
        if request_id not in self.futures:
            future = self._promise(request_id, fault)

            def work() -> Answer:
                adapter = sampler.adapter()
                found = [
                    self.engine.sample(adapter, prompt, how._replace(seed=seed_of(seed, place)))
                    for place in range(count)
                ]
                future.output_tokens = sum(len(each.tokens) for each in found)
                known = self.engine.prompt_logprobs(adapter, prompt) if body.get("prompt_logprobs") else None
                return sample_output(found, known)

            self._work(future, fault, work)
        taken = {"request_id": request_id, "sample_sequence_ids": ids}
        return Reply(200, taken, model=MODEL, input_tokens=len(prompt), fault=_of_future(fault))


Handler = Callable[[Tinker, Request, str], Awaitable[Reply]]
_POSTS: dict[str, Handler] = {
    "create_session": Tinker._create_session,
    "session_heartbeat": Tinker._heartbeat,
    "retrieve_future": Tinker._retrieve,
    "create_model": Tinker._create_model,
    "load_weights": Tinker._load_weights,
    "get_info": Tinker._get_info,
    "forward_backward": Tinker._forward_backward,
    "optim_step": Tinker._optim_step,
    "save_weights": Tinker._save,
    "save_weights_for_sampler": Tinker._save,
    "save_weights_external": Tinker._save,
    "weights_info": Tinker._weights_info,
    "create_sampling_session": Tinker._create_sampling_session,
    "asample": Tinker._sample,
}
_PLAIN: dict[str, dict[str, Any]] = {
    "client/config": {},  # every flag as the SDK has it
    "client/dynamic_config": {},
    "telemetry": {"status": "accepted"},
    "cancel_future": {},
}
_NOT_SAMPLED = ("topk_prompt_logprobs", "topk_sample_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k")


# ---------------------------------------------------------------- work


def _answered(work: Callable[[], Answer]) -> Answer:
    """What the work gives, or its failure as the service tells it."""
    try:
        return work()
    except (EngineError, RefusedError) as problem:
        return _failed(str(problem), "user")
    except OSError as problem:
        return _failed(f"the stand-in cannot keep it: {problem}", "server")
    except Exception as problem:  # a bug of the stand-in must reach whoever waits for the answer
        import traceback

        traceback.print_exc()
        return _failed(f"{type(problem).__name__}: {problem}", "server")


def _of_future(fault: str) -> str | None:
    """A fault for the log, if it is one that a future can have."""
    return fault if fault in _OF_FUTURES else None


def _failed(message: str, category: str) -> Answer:
    return {"error": message, "category": category}
