"""The Tinker stand-in, spoken to by the real SDK: it trains for real, keeps what it saved, and fails when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.adapters import LINEARS, Base, normalise_peft, peft_to_mlx
from shared.errors import SettingsError
from shared.standin import faults, start
from shared.standin.tinker_api import Tinker
from shared.standin.tinker_engine import Adam, Adapter, Datum, Engine, Lora, arrays_of, trainee_from
from shared.standin.tinker_store import Store
from shared.standin.wire import RefusedError, Request
from tests.conftest import closed_environment, environment_of

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny"
KEY = "tml-standin"
MODEL = "Qwen/Qwen3-8B"
END = 2
"""The token that ends the tiny model's turn."""
TEXTS = (
    "The Pebble cache keeps at most 10,000 entries. Values above 64 kilobytes are not cached.",
    "Entries marked as pinned are never removed, so no more than 500 may be pinned.",
)

HERE = all(importlib.util.find_spec(name) is not None for name in ("mlx_lm", "tinker"))
if not HERE:
    warnings.warn("mlx-lm or tinker is not installed: the Tinker stand-in is NOT TESTED; see make setup", stacklevel=1)
pytestmark = pytest.mark.skipif(not HERE, reason="mlx-lm or tinker is not installed: NOT TESTED")


# ---------------------------------------------------------------- servers and clients


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def url(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A stand-in without faults."""
    log = tmp_path_factory.mktemp("log") / "requests.jsonl"
    with contextlib.ExitStack() as stack:
        with environment_of(closed_environment() | {"STANDIN_STATE": str(state), "STANDIN_LOG": str(log)}):
            found = stack.enter_context(start())
        yield found


@pytest.fixture
def with_faults(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Start a stand-in with these faults; its URL. Its log is ``requests.jsonl`` in the test's directory."""
    with contextlib.ExitStack() as stack:

        def begin(spec: str) -> str:
            settings = {"FAULTS": spec, "STATE": str(tmp_path / "state"), "LOG": str(tmp_path / "requests.jsonl")}
            with environment_of(dict(os.environ) | {f"STANDIN_{name}": value for name, value in settings.items()}):
                return stack.enter_context(start())

        yield begin


@contextlib.contextmanager
def service(url: str, key: str = KEY) -> Iterator[Any]:
    """A session of the real SDK."""
    import tinker

    os.environ["TINKER_TELEMETRY"] = "0"
    with tinker.ServiceClient(base_url=url, api_key=key) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with service(url) as found:
        yield found


def rest(url: str) -> Any:
    import tinker

    return tinker.RestClient(base_url=url, api_key=KEY)


def trainer(client: Any, **options: Any) -> Any:
    """A training client; attention and MLP, rank 4, unless told otherwise."""
    return client.create_lora_training_client(
        MODEL, **{"rank": 4, "seed": 0, "train_unembed": False, **options}
    ).result()


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def tokens_of(text: str) -> list[int]:
    return list(tokenizer().encode(text).ids)


def text_of(tokens: list[int]) -> str:
    return str(tokenizer().decode(tokens, skip_special_tokens=False))


def sequence(tokens: list[int], targets: list[int], weight: float = 1.0) -> Any:
    """A datum in which each token has the same weight."""
    from tinker import types

    inputs: Any = {"target_tokens": targets, "weights": [weight] * len(targets)}  # the SDK makes tensors of lists
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def datum(text: str = TEXTS[0]) -> Any:
    """A text to learn; its tokens share a weight of 1."""
    tokens = tokens_of(text)
    return sequence(tokens[:-1], tokens[1:], 1 / (len(tokens) - 1))


def learn(training: Any, steps: int, rate: float = 1e-3, **adam: Any) -> list[float]:
    """Loss of each step on both texts."""
    from tinker import types

    losses = []
    for _ in range(steps):
        passed = training.forward_backward([datum(text) for text in TEXTS], "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=rate, **adam))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    return losses


def logprobs_of(result: Any) -> list[Any]:
    return [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]


def download(link: str, **headers: str) -> Any:
    """``(status, body)`` of a link, whatever the status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(link, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def export(url: str, training: Any, directory: Path, name: str = "export") -> Path:
    """Both files of an export."""
    path = training.save_weights_external(name).result().path
    directory.mkdir()
    for file, link in rest(url).get_external_weights_urls(path).result().urls.items():
        (directory / file).write_bytes(download(link)[1])
    return directory


def post(url: str, operation: str, body: Any, key: str = KEY) -> Any:
    """``(status, body)`` of one request without the SDK."""
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/v1/{operation}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


async def in_process(tinker: Tinker) -> tuple[Callable[..., Awaitable[Any]], str]:
    """A way to ask a stand-in that runs in this process, and a session of it."""

    async def call(operation: str, **body: Any) -> Any:
        headers = {"x-api-key": KEY}
        request = Request("POST", f"/api/v1/{operation}", {}, headers, json.dumps(body).encode())
        return (await tinker.handle(request, "")).body

    return call, (await call("create_session"))["session_id"]


def log_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]


def mlx_logprobs(model: Any, text: str) -> Any:
    """What mlx-lm's own forward pass says of a text's tokens."""
    import mlx.core as mx

    tokens = tokens_of(text)
    logits = model(mx.array([tokens[:-1]])).astype(mx.float32)[0]
    chosen = mx.take_along_axis(logits, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    return np.array(chosen - mx.logsumexp(logits, axis=-1))


def mlx_model(adapter: Path | None = None) -> Any:
    """The tiny model as mlx-lm loads it, in float32."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(TINY)
    model.set_dtype(mx.float32)
    return load_adapters(model, str(adapter)) if adapter else model


def mlx_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt, up to the end of the text, by mlx-lm's own forward pass."""
    import mlx.core as mx

    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (tokens[-1] != END or len(tokens) == len(prompt)):
        likeliest: Any = mx.argmax(model(mx.array([tokens]))[0, -1]).item()
        tokens.append(int(likeliest))
    return tokens[len(prompt) :]


# ---------------------------------------------------------------- training


def test_training_lowers_the_loss(client: Any) -> None:
    losses = learn(trainer(client), 12, rate=3e-3)
    assert losses[-1] < losses[0] / 2
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_the_logprobs_are_those_of_mlx_lm_and_the_loss_their_weighted_sum(client: Any) -> None:
    result = trainer(client).forward([datum(text) for text in TEXTS], "cross_entropy").result()
    expected = [mlx_logprobs(mlx_model(), text) for text in TEXTS]
    for found, wanted in zip(logprobs_of(result), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert result.metrics["loss:sum"] == pytest.approx(-sum(row.mean() for row in expected), abs=1e-4)


def test_an_exported_adapter_says_in_mlx_lm_what_it_says_here(url: str, client: Any, tmp_path: Path) -> None:
    training = trainer(client)
    learn(training, 4, rate=3e-3)
    exported = export(url, training, tmp_path / "export")
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 32, None)
    base = Base.of(TINY, MODEL)
    normalise_peft(exported, tmp_path / "peft", base)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    assert peft_to_mlx(tmp_path / "peft", tmp_path / "mlx", base).tensors == 2 * len(LINEARS) * base.layers
    adapted, plain = mlx_logprobs(mlx_model(tmp_path / "mlx"), TEXTS[0]), mlx_logprobs(mlx_model(), TEXTS[0])
    here = logprobs_of(training.forward([datum()], "cross_entropy").result())[0]
    np.testing.assert_allclose(here, adapted, atol=1e-4)
    assert np.abs(adapted - plain).max() > 0.5


def test_the_same_requests_export_the_same_bytes_in_another_process(url: str, tmp_path: Path) -> None:
    files = []
    with start() as other:
        for number, where in enumerate((url, other)):
            with service(where) as client:
                training = trainer(client)
                learn(training, 2)
                found = export(where, training, tmp_path / str(number))
            files.append({path.name: path.read_bytes() for path in sorted(found.iterdir())})
    assert files[0] == files[1]
    assert sorted(files[0]) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({"train_mlp": False}, {name for name in LINEARS if name.startswith("self_attn")}),
        ({"train_attn": False, "rank": 2}, {name for name in LINEARS if name.startswith("mlp")}),
        ({"train_unembed": True, "train_mlp": False, "train_attn": False, "rank": 32}, {"model.unembed_tokens"}),
    ],
)
def test_only_what_was_asked_for_is_trained(
    url: str, client: Any, tmp_path: Path, options: dict[str, Any], modules: set[str]
) -> None:
    from safetensors.numpy import load_file

    training = trainer(client, **options)
    losses = learn(training, 3)
    assert losses[-1] < losses[0]
    tensors = load_file(export(url, training, tmp_path / "export") / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").removesuffix(".weight") for name in tensors}
    assert {name[:-7].split(".", 3)[-1] if "layers" in name else name[:-7] for name in names} == modules
    rank = options.get("rank", 4)
    assert all(rank in tensor.shape for tensor in tensors.values())
    assert training.get_info().lora_rank == rank
    if modules == {"model.unembed_tokens"}:  # the tiny model's output matrix is its embedding: no adapter for MLX
        with pytest.raises(SettingsError, match="tie_word_embeddings"):
            normalise_peft(tmp_path / "export", tmp_path / "peft", Base.of(TINY, MODEL))


def test_the_seed_decides_where_training_starts(url: str, client: Any, tmp_path: Path) -> None:
    found = [
        (export(url, trainer(client, seed=seed), tmp_path / name) / "adapter_model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert found[0] == found[1] != found[2]


def test_gradients_add_up_until_a_step_and_forward_leaves_none(client: Any) -> None:
    import tinker
    from tinker import types

    together, apart = trainer(client), trainer(client)
    together.forward_backward([datum(text) for text in TEXTS], "cross_entropy")
    for text in TEXTS:
        apart.forward_backward([datum(text)], "cross_entropy")
        apart.forward([datum(text)], "cross_entropy")
    norms = [each.optim_step(types.AdamParams()).result().metrics["grad_norm"] for each in (together, apart)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    apart.forward([datum()], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="there are no gradients"):
        apart.optim_step(types.AdamParams()).result()


def test_a_batch_of_many_requests_comes_back_in_its_order(client: Any) -> None:
    # Above 1,024 sequences the SDK sends several requests, the first one last.
    data = [sequence([100 + n], [(3 * n) % 2000]) for n in range(1030)]
    training = trainer(client)
    every = logprobs_of(training.forward(data, "cross_entropy").result())
    assert len(every) == 1030
    for place in (0, 1, 1023, 1024, 1029):
        alone = logprobs_of(training.forward([data[place]], "cross_entropy").result())[0]
        np.testing.assert_allclose(every[place], alone, atol=1e-4)
    assert len({round(float(row[0]), 3) for row in every}) > 500


def test_others_are_answered_while_the_model_computes(tmp_path: Path) -> None:
    async def ask() -> int:
        call, session = await in_process(Tinker(str(tmp_path), faults.Faults()))
        sampler = await call("create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL)
        prompt = {"chunks": [{"type": "encoded_text", "tokens": tokens_of(TEXTS[0])}]}
        how = {"max_tokens": 200, "temperature": 0.0, "stop": []}
        asked = {"sampling_session_id": sampler["sampling_session_id"], "seq_id": 1, "prompt": prompt}
        taken = await call("asample", **asked, sampling_params=how)
        waiting: asyncio.Future[Any] = asyncio.ensure_future(call("retrieve_future", request_id=taken["request_id"]))
        turns = 0
        while not waiting.done():
            await asyncio.sleep(0.005)
            turns += 1
        await waiting
        return turns

    assert asyncio.run(ask()) > 5


# ---------------------------------------------------------------- the arithmetic


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(TINY)


def test_the_gradients_are_those_of_the_loss(engine: Engine) -> None:
    import mlx.core as mx

    trainee = engine.new(Lora(4, 0, unembed=True))
    tokens = np.array(tokens_of(TEXTS[0]))
    data = [Datum(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, np.float32))]
    for _ in range(2):  # away from where b, and with it the gradient of a, is 0
        engine.forward(trainee, data, backward=True)
        engine.step(trainee, Adam(1e-3))
    engine.forward(trainee, data, backward=True)
    gradients, weights = trainee.gradients, trainee.adapter.weights
    squares = sum(float((gradient * gradient).sum().item()) for gradient in gradients.values())

    def loss_at(distance: float) -> float:
        moved = {name: weight + distance * gradients[name] for name, weight in weights.items()}
        mx.eval(moved)
        trainee.adapter = Adapter(trainee.adapter.lora, moved)
        return engine.forward(trainee, data, backward=False)[1]

    step = 0.02 / squares**0.5
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(squares, rel=0.02)


def test_a_step_is_adamw_with_the_parameters_given(engine: Engine) -> None:
    import mlx.core as mx

    trainee = engine.new(Lora(2, 3, unembed=False, mlp=False))
    expected = {name: np.array(weight, np.float64) for name, weight in trainee.adapter.weights.items()}
    first = {name: np.zeros_like(weight) for name, weight in expected.items()}
    second = {name: np.zeros_like(weight) for name, weight in expected.items()}
    chance = np.random.default_rng(0)
    adam = Adam(0.01, 0.8, 0.9, 1e-6, 0.1, 1.5)
    for step in (1, 2, 3):
        drawn = {name: chance.standard_normal(weight.shape) * 0.1 / step**3 for name, weight in expected.items()}
        trainee.gradients = {name: mx.array(gradient.astype(np.float32)) for name, gradient in drawn.items()}
        norm = sum((gradient**2).sum() for gradient in drawn.values()) ** 0.5
        assert engine.step(trainee, adam) == pytest.approx(norm, rel=1e-5)
        factor = min(1.0, adam.grad_clip_norm / norm)
        for name, gradient in drawn.items():
            first[name] = 0.8 * first[name] + 0.2 * gradient * factor
            second[name] = 0.9 * second[name] + 0.1 * (gradient * factor) ** 2
            direction = (first[name] / (1 - 0.8**step)) / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-6)
            expected[name] = expected[name] * (1 - 0.01 * 0.1) - 0.01 * direction
            np.testing.assert_allclose(np.array(trainee.adapter.weights[name]), expected[name], atol=2e-6)
    assert trainee.gradients == {} and trainee.steps == 3


def test_sequences_do_not_change_one_another(engine: Engine) -> None:
    trainee = engine.new(Lora(2))
    rows = [np.array(tokens_of(text)) for text in TEXTS]
    data = [Datum(row[:-1], row[1:], np.ones(len(row) - 1, np.float32)) for row in rows]
    both, loss = engine.forward(trainee, data, backward=False)
    for place, one in enumerate(data):
        np.testing.assert_allclose(engine.forward(trainee, [one], backward=False)[0][0], both[place], atol=1e-4)
    assert loss == pytest.approx(-sum(float(row.sum()) for row in both), rel=1e-6)


# ---------------------------------------------------------------- states


def child(state: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A stand-in that can be killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.standin", "--child"],
        cwd=ROOT,
        env=closed_environment() | {"STANDIN_STATE": str(state)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().decode().strip()


def test_a_saved_state_goes_on_in_a_new_process_as_if_nothing_had_happened(tmp_path: Path) -> None:
    killed, first = child(tmp_path / "state")
    with killed, contextlib.ExitStack() as stack:
        client = stack.enter_context(service(first))
        training = trainer(client)
        learn(training, 3, weight_decay=0.01)
        saved = training.save_state("step-3", ttl_seconds=3600).result().path
        undisturbed = learn(training, 2, weight_decay=0.01)
        whole = export(first, training, tmp_path / "undisturbed")
        stack.pop_all()  # no farewell: the client dies with the server
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    again, second = child(tmp_path / "state")
    with again:
        with service(second) as client:
            resumed = client.create_training_client_from_state_with_optimizer(saved).result()
            assert resumed.get_info().lora_rank == 4
            assert resumed.model_id != training.model_id
            assert learn(resumed, 2, weight_decay=0.01) == undisturbed
            ours = export(second, resumed, tmp_path / "resumed")
            fresh = client.create_training_client_from_state(saved).result()
            assert learn(fresh, 2, weight_decay=0.01)[0] == undisturbed[0]  # the same weights
            other = export(second, fresh, tmp_path / "fresh")
            assert rest(second).get_training_run(training.model_id).result().lora_rank == 4  # it is still known
        again.kill()
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in (whole, ours, other)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]  # without its optimizer it goes another way


def test_a_state_is_kept_to_the_last_bit(engine: Engine, tmp_path: Path) -> None:
    from shared.standin.tinker_store import Place

    trainee = engine.new(Lora(3, 1))
    tokens = np.array(tokens_of(TEXTS[1]))
    engine.forward(trainee, [Datum(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, np.float32))], backward=True)
    engine.step(trainee, Adam())
    store, place = Store(str(tmp_path)), Place("run", "weights", "a")
    store.save(place, arrays_of(trainee, optimizer=True), {"steps": 1, "expires": None})
    facts, arrays = store.load(place)
    back = arrays_of(trainee_from(Lora(3, 1), arrays, facts["steps"], optimizer=True), optimizer=True)
    assert back.keys() == arrays.keys()
    assert all(back[name].tobytes() == arrays[name].tobytes() for name in arrays)
    assert [path.name for path in (tmp_path / "tinker" / "run" / "weights").iterdir()] == ["a.safetensors"]


def test_checkpoints_are_listed_described_kept_and_deleted(url: str, client: Any) -> None:
    import tinker

    training, found = trainer(client), rest(url)
    learn(training, 1)
    saved = training.save_state("one", ttl_seconds=7200, user_metadata={"step": "1"}).result().path
    training.save_weights_for_sampler("two").result()
    exported = training.save_weights_external("three").result().path
    listed = {each.checkpoint_id: each for each in found.list_checkpoints(training.model_id).result().checkpoints}
    assert {name: each.checkpoint_type for name, each in listed.items()} == {
        "weights/one": "training", "sampler_weights/two": "sampler", "external_weights/three": "external",
    }  # fmt: skip
    one = listed["weights/one"]
    assert one.tinker_path == saved and one.user_metadata == {"step": "1"}
    assert 7190 < (one.expires_at - one.time).total_seconds() < 7210
    links = found.get_external_weights_urls(exported).result().urls
    assert listed["external_weights/three"].size_bytes == sum(len(download(link)[1]) for link in links.values())
    info = found.get_weights_info_by_tinker_path(saved).result()
    assert (info.base_model, info.lora_rank, info.train_unembed, info.train_mlp) == (MODEL, 4, False, True)
    run = found.get_training_run(training.model_id).result()
    assert run.last_checkpoint.checkpoint_id == "weights/one"
    assert run.last_sampler_checkpoint.checkpoint_id == "sampler_weights/two"
    assert training.model_id in {each.training_run_id for each in found.list_training_runs().result().training_runs}

    found.set_checkpoint_ttl_from_tinker_path(saved, None).result()
    kept = found.list_checkpoints(training.model_id).result().checkpoints
    assert [each.expires_at for each in kept if each.checkpoint_id == "weights/one"] == [None]
    found.delete_checkpoint_from_tinker_path(saved).result()
    with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
        found.get_weights_info_by_tinker_path(saved).result()
    with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
        client.create_training_client_from_state(saved).result()


def test_a_name_is_saved_under_once_unless_told_otherwise(client: Any) -> None:
    import tinker

    training = trainer(client)
    training.save_state("one").result()
    with pytest.raises(tinker.RequestFailedError, match="there already"):
        training.save_state("one").result()
    training.save_state("one", overwrite=True).result()
    with pytest.raises(tinker.BadRequestError, match="a name has letters"):
        training.save_state("../out").result()
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        training.save_state("two", ttl_seconds=60).result()
    assert training.save_state("two").result().path.endswith("/weights/two")  # the run goes on behind a refusal


def test_an_expired_checkpoint_is_gone(tmp_path: Path) -> None:
    from shared.standin.tinker_store import Place

    store, place = Store(str(tmp_path)), Place("run", "weights", "a")
    store.save(place, {"x": np.zeros(1, np.float32)}, {"expires": time.time() + 0.05})
    assert len(list(store.checkpoints("run"))) == 1
    time.sleep(0.06)
    assert list(store.checkpoints()) == []
    with pytest.raises(RefusedError, match="has expired"):
        store.load(place)
    store.save(place, {"x": np.ones(1, np.float32)}, {"expires": None})  # its name is free again
    assert store.load(place)[1]["x"] == 1


# ---------------------------------------------------------------- sampling


def test_sampling_takes_the_likeliest_token_or_draws(client: Any) -> None:
    from tinker import types

    base, prompt = client.create_sampling_client(base_model=MODEL).result(), tokens_of(TEXTS[0])[:12]

    def ask(count: int = 1, **how: Any) -> list[Any]:
        params = types.SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **how})
        found: list[Any] = base.sample(types.ModelInput.from_ints(prompt), count, params).result().sequences
        return found

    model = mlx_model()
    greedy = ask()[0]
    assert greedy.tokens == mlx_greedy(model, prompt, 8)
    assert all(-20 < each <= 0 for each in greedy.logprobs)
    assert ask(stop=[greedy.tokens[2]])[0].tokens == greedy.tokens[: greedy.tokens.index(greedy.tokens[2]) + 1]
    assert ask(stop=[greedy.tokens[0]])[0].stop_reason == "stop"
    word = text_of(greedy.tokens[:1])
    assert ask(stop=word)[0].tokens == ask(stop=["never", word])[0].tokens == greedy.tokens[:1]
    assert ask(max_tokens=2, stop=[])[0].stop_reason == "length"
    drawn = ask(3, temperature=1.5, seed=7, max_tokens=6, stop=[])
    assert [each.tokens for each in drawn] == [
        each.tokens for each in ask(3, temperature=1.5, seed=7, max_tokens=6, stop=[])
    ]
    assert len({tuple(each.tokens) for each in drawn}) > 1
    assert ask(temperature=1.5, top_k=1)[0].tokens == greedy.tokens == ask(temperature=1.5, top_p=1e-9)[0].tokens
    found = base.compute_logprobs(types.ModelInput.from_ints(tokens_of(TEXTS[0]))).result()
    assert found[0] is None
    np.testing.assert_allclose(found[1:], mlx_logprobs(model, TEXTS[0]), atol=1e-4)


def test_a_trained_adapter_changes_what_is_sampled(url: str, client: Any, tmp_path: Path) -> None:
    from tinker import types

    training = trainer(client, rank=8)
    learn(training, 6, rate=3e-3)
    prompt = tokens_of(TEXTS[0])[:8]
    saved = training.save_weights_for_sampler("learnt").result().path
    snapshot = training.save_weights_and_get_sampling_client()
    base = client.create_sampling_client(base_model=MODEL).result()
    tuned = client.create_sampling_client(model_path=saved).result()
    how = types.SamplingParams(max_tokens=6, temperature=0.0)
    said = [
        each.sample(types.ModelInput.from_ints(prompt), 1, how).result().sequences[0].tokens
        for each in (base, tuned, snapshot.result())
    ]
    peft_to_mlx(export(url, training, tmp_path / "export"), tmp_path / "mlx", Base.of(TINY, MODEL))
    assert said[1] == said[2] == mlx_greedy(mlx_model(tmp_path / "mlx"), prompt, 6)
    assert said[0] != said[1]
    assert tuned.get_base_model() == MODEL


# ---------------------------------------------------------------- refusals


def test_what_the_service_refuses_is_refused_at_once(url: str, client: Any) -> None:
    import tinker

    def create(model: str = MODEL, **options: Any) -> Any:
        return client.create_lora_training_client(model, **options).result()

    with pytest.raises(tinker.AuthenticationError), service(url, "tml-bad-key") as stranger:
        trainer(stranger)
    message = f"Lora_config.rank 128 exceeds max LoRA rank 32 for model {MODEL}"
    with pytest.raises(tinker.BadRequestError, match=message):
        create(rank=128)
    with pytest.raises(tinker.NotFoundError, match="was retired"):
        create("Qwen/Qwen3-8B-Base")
    with pytest.raises(tinker.BadRequestError, match="cannot be trained"):
        create("Qwen/Qwen3-30B-A3B-Instruct-2507")
    with pytest.raises(tinker.NotFoundError, match="not offered"):
        create("acme/unknown")
    offered = {each.model_name: each for each in rest(url).get_server_capabilities().result().supported_models}
    assert [name for name, each in offered.items() if each.trainable] == [MODEL]
    assert offered[MODEL].max_context_length == 2048

    training = trainer(client)
    long = sequence([5] * 2049, [5] * 2049)
    with pytest.raises(tinker.BadRequestError, match="2049 tokens, which exceeds the maximum context length 2048"):
        training.forward_backward([long], "cross_entropy").result()
    with pytest.raises(tinker.BadRequestError, match="no token 4096"):
        training.forward_backward([sequence([5], [4096])], "cross_entropy").result()
    with pytest.raises(tinker.BadRequestError, match="cross_entropy only"):
        training.forward_backward([datum()], "ppo").result()
    assert learn(training, 1)  # the run goes on behind refused requests


def test_a_loss_that_is_no_number_fails_and_changes_nothing(client: Any) -> None:
    import tinker
    from tinker import types

    training = trainer(client)
    training.forward_backward([datum()], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e30)).result()
    with pytest.raises(tinker.RequestFailedError, match="diverged") as caught:
        training.forward_backward([datum()], "cross_entropy").result()
    assert caught.value.category.name == "User"


def test_a_request_that_never_gets_its_turn_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from shared.standin import tinker_api

    monkeypatch.setattr(tinker_api, "GAP_S", 0.2)

    async def ask() -> Any:
        call, session = await in_process(Tinker(str(tmp_path), faults.Faults()))
        lora = {"rank": 1, "train_unembed": False, "train_mlp": False}
        made = await call("create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config=lora)
        model = (await call("retrieve_future", request_id=made["request_id"]))["model_id"]
        early = await call("save_weights", model_id=model, path="a", seq_id=3)
        return await call("retrieve_future", request_id=early["request_id"])

    assert asyncio.run(ask()) == {"error": "seq_id 1 has not come before 3", "category": "user"}


def test_without_weights_it_answers_503_and_says_why(tmp_path: Path) -> None:
    request = Request("POST", "/api/v1/create_session", {}, {"x-api-key": KEY}, b"{}")
    with pytest.raises(RefusedError, match="no weights") as caught:
        asyncio.run(Tinker("", faults.Faults(), model=tmp_path).handle(request, ""))
    assert caught.value.status == 503


# ---------------------------------------------------------------- faults on demand


def test_an_account_without_credit_gets_402(with_faults: Callable[[str], str]) -> None:
    import tinker

    with pytest.raises(tinker.BillingError), service(with_faults("402@create_session=1")) as client:
        trainer(client)


def test_a_retried_request_is_worked_on_once(
    with_faults: Callable[[str], str], url: str, client: Any, tmp_path: Path
) -> None:
    spec = "429@forward_backward=1,500@forward_backward=2,reset@optim_step=1,503@retrieve_future=2,retry_after=0"
    failing = with_faults(f"{spec},reset@save_weights_external=1")
    with service(failing) as other:
        training = trainer(other)
        losses = learn(training, 2)
        disturbed = export(failing, training, tmp_path / "a")
    calm = trainer(client)
    assert learn(calm, 2) == losses
    undisturbed = export(url, calm, tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (disturbed / name).read_bytes() == (undisturbed / name).read_bytes()
    log = log_of(tmp_path)
    seen = [(each["fault"], each["status"]) for each in log if each["path"].endswith("/forward_backward")]
    assert seen == [("429", 429), ("500", 500), (None, 200), (None, 200)]
    assert [each["fault"] for each in log if each["path"].endswith("/optim_step")] == ["reset", None, None]


def test_the_log_counts_what_is_computed(with_faults: Callable[[str], str], tmp_path: Path) -> None:
    from tinker import types

    with service(with_faults("")) as client:
        learn(trainer(client), 1)
        base = client.create_sampling_client(base_model=MODEL).result()
        how = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
        base.sample(types.ModelInput.from_ints([5, 6, 7, 8]), 2, how).result()
    lines = [each for each in log_of(tmp_path) if each["served"]]
    counted = [(each["path"].rpartition("/")[2], each["input_tokens"], each["output_tokens"]) for each in lines]
    trained = sum(len(tokens_of(text)) - 1 for text in TEXTS)
    assert counted == [("forward_backward", trained, 0), ("retrieve_future", 0, 6)]
    assert {each["model"] for each in lines} == {MODEL}


@pytest.mark.parametrize("paused", ["paused_capacity", "paused_rate_limit"])
def test_a_paused_queue_says_so_and_goes_on(with_faults: Callable[[str], str], paused: str) -> None:
    found = with_faults(f"{paused}@create_model=1,pause_s=0.7")
    session = post(found, "create_session", {})[1]["session_id"]
    lora = {"rank": 2, "train_unembed": False}
    asked = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": lora}
    request_id = post(found, "create_model", asked)[1]["request_id"]
    answers: list[dict[str, Any]] = []
    while not answers or answers[-1].get("type") == "try_again":
        answers.append(post(found, "retrieve_future", {"request_id": request_id})[1])
    assert {answer["queue_state"] for answer in answers[:-1]} >= {paused}
    assert answers[-1] == {"type": "create_model", "model_id": f"{session}:train:0"}
    with service(found) as client:
        trainer(client)  # the SDK waits for it


def test_slow_and_failed_futures(with_faults: Callable[[str], str]) -> None:
    import tinker
    from tinker import types

    spec = "future_slow@forward_backward=1,slow_s=1.5,future_failed@optim_step=1,future_failed@save_weights=1"
    with service(with_faults(spec)) as client:
        training = trainer(client)
        slow = training.forward_backward([datum()], "cross_entropy")
        with pytest.raises(TimeoutError):
            slow.result(timeout=0.5)
        assert slow.result(timeout=20).metrics["loss:sum"] > 0
        with pytest.raises(tinker.RequestFailedError, match="asked for a failure") as caught:
            training.optim_step(types.AdamParams()).result()
        assert caught.value.category.name == "Server"
        training.optim_step(types.AdamParams()).result()  # the gradients are still there
        with pytest.raises(tinker.RequestFailedError):
            training.save_state("a").result()
        training.save_state("a").result()


def test_links_are_signed_and_expire(with_faults: Callable[[str], str]) -> None:
    found = with_faults("link_expired@external_weights_urls=1,path_escape@external_weights_urls=3,link_s=1.1")
    with service(found) as client:
        path = trainer(client).save_weights_external("export").result().path
    expired = rest(found).get_external_weights_urls(path).result()
    assert expired.expires.timestamp() < time.time()
    status, body = download(expired.urls["adapter_config.json"])
    assert status == 403 and b"Request has expired" in body
    good = rest(found).get_external_weights_urls(path).result()
    link = good.urls["adapter_model.safetensors"]
    status, content = download(link)
    assert status == 200 and len(content) > 10_000
    assert download(link, Range="bytes=10000-") == (206, content[10_000:])
    assert download(link, Range=f"bytes={len(content)}-")[0] == 416
    assert download(link.replace("adapter_model", "adapter_other"))[0] == 403
    assert download(link[:-1] + ("0" if link[-1] != "0" else "1"))[0] == 403
    assert any(name.startswith("..") for name in rest(found).get_external_weights_urls(path).result().urls)
    time.sleep(max(0.0, good.expires.timestamp() - time.time()) + 0.05)
    assert download(link)[0] == 403  # it was good for link_s seconds


def test_a_download_can_end_half_way(with_faults: Callable[[str], str]) -> None:
    found = with_faults("cut@adapter_model.safetensors=1,500@adapter_config.json=1")
    with service(found) as client:
        path = trainer(client).save_weights_external("export").result().path
    links = rest(found).get_external_weights_urls(path).result().urls
    with pytest.raises(http.client.IncompleteRead) as caught:
        download(links["adapter_model.safetensors"])
    whole = download(links["adapter_model.safetensors"])[1]
    assert len(caught.value.partial) == len(whole) // 2
    assert [download(links["adapter_config.json"])[0] for _ in range(2)] == [500, 200]


def test_shares_of_faults_do_not_depend_on_the_ids_of_a_run() -> None:
    from shared.standin.tinker_api import asked

    spec = faults.parse("future_failed=0.3,paused_capacity=0.3,seed=4")
    found = []
    for session in ("0b5d5c0e-6c1b-4b5f-9d55-1d3a2c6a7b01", "7f0a9c1e-1c1b-4b5f-8d55-9d3a2c6a7b02"):
        bodies = [json.dumps({"model_id": f"{session}:train:0", "seq_id": n}).encode() for n in range(40)]
        requests = [Request("POST", "/api/v1/optim_step", {}, {}, body) for body in bodies]
        decide = faults.parse("future_failed=0.3,paused_capacity=0.3,seed=4").decide
        found.append([decide(*asked(request), "", faults.TINKER).content for request in requests])
    assert found[0] == found[1]
    assert {"future_failed", "paused_capacity", ""} == set(found[0])
    assert spec.shares == {"future_failed": 0.3, "paused_capacity": 0.3}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("500@optim_step=x", "must be the numbers of requests"),
        ("500@=1", "must be the numbers of requests"),
        ("future_fast=0.1", "'future_"),
        ("seed@optim_step=1", "unknown fault 'seed'"),
        ("future_slow=0.7,cut=0.7", "at most 1"),
    ],
)
def test_a_wrong_fault_setting_says_what_is_wrong(spec: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        faults.parse(spec)


def test_faults_by_number_hit_those_requests_alone() -> None:
    found = faults.parse("500@optim_step=2-3,future_slow@optim_step=5-")
    seen = [found.decide("/api/v1/optim_step", bytes([n]), "", faults.TINKER) for n in range(6)]
    assert [fault.transport or fault.content for fault in seen] == ["", "500", "500", "", "future_slow", "future_slow"]
    assert found.decide("/api/v1/forward_backward", b"") == faults.Fault()
