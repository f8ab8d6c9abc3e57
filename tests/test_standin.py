"""The stand-in cloud, spoken to by the real SDKs, unmodified."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from shared.errors import SettingsError
from shared.standin import faults, hub_data, start
from tests.conftest import closed_environment

ROOT = Path(__file__).resolve().parent.parent
PASSAGE = (
    "The Pebble cache keeps at most 10,000 entries. Values above 64 kilobytes are not cached. "
    "Entries marked as pinned are never removed, so no more than 500 may be pinned."
)
QUESTION = f"List the key points of the text.\n\n<text>\n{PASSAGE}\n</text>"


class Points(BaseModel):
    points: list[str]
    confidence: float = Field(ge=0, le=1)
    kind: str | None


@pytest.fixture(scope="session")
def url(_standin_server: tuple[str, Path]) -> str:
    return _standin_server[0]


@pytest.fixture
def claude(url: str) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)


@pytest.fixture
def gpt(url: str) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def gemini(url: str) -> Any:
    from google import genai

    return genai.Client(api_key="any", http_options=genai.types.HttpOptions(base_url=url, timeout=10_000))


def post(url: str, body: Any, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions") -> Any:
    """``(status, headers, body)`` of one request with plain HTTP."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Authorization": "Bearer any", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def chat(text: str, model: str = "gpt-6-luna", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "reasoning_effort": "none", **more}


# ---------------------------------------------------------------- Anthropic


def test_claude_answers_in_text_from_the_prompt(claude: Any) -> None:
    raw = claude.messages.with_raw_response.create(
        model="claude-haiku-5-5", max_tokens=500, system="Be terse.", messages=[{"role": "user", "content": QUESTION}]
    )
    message = raw.parse()
    assert [block.type for block in message.content] == ["thinking", "text"]  # thinking is on unless told otherwise
    assert "10,000" in message.content[1].text and "64 KB" in message.content[1].text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens_details.thinking_tokens > 0
    counted = claude.messages.count_tokens(
        model="claude-haiku-5-5", system="Be terse.", messages=[{"role": "user", "content": QUESTION}]
    )
    assert counted.input_tokens == message.usage.input_tokens
    assert int(raw.headers["anthropic-ratelimit-requests-remaining"]) > 0
    assert raw.headers["request-id"].startswith("req_")


def test_claude_obeys_a_schema(claude: Any) -> None:
    import anthropic

    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=500,
        thinking={"type": "disabled"},
        messages=[{"role": "user", "content": QUESTION}],
        output_config={"format": {"type": "json_schema", "schema": anthropic.transform_schema(Points)}},
    )
    assert [block.type for block in message.content] == ["text"]
    assert len(Points.model_validate_json(message.content[0].text).points) == 3


def test_claude_truncates_at_max_tokens(claude: Any) -> None:
    message = claude.messages.create(
        model="claude-sonnet-5-5",
        max_tokens=5,
        thinking={"type": "between_tools"},
        messages=[{"role": "user", "content": QUESTION}],
    )
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 5
    assert len(message.content[0].text.encode()) <= 20


def test_claude_refuses_when_asked_for_a_refusal(claude: Any) -> None:
    message = claude.messages.create(
        model="claude-haiku-5-5",
        max_tokens=500,
        messages=[{"role": "user", "content": QUESTION}],
        extra_headers={"x-standin-fault": "refuse"},
    )
    assert message.stop_reason == "refusal" and message.content == []
    assert message.stop_details.category == "other"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("429", "RateLimitError"),
        ("529", "OverloadedError"),
        ("500", "InternalServerError"),
        ("413", "ContentTooLargeError"),
        ("quota", "EnforcedSpendLimitReachedError"),
        ("reset", "APIConnectionError"),
    ],
)
def test_claude_faults_raise_the_errors_of_the_sdk(claude: Any, fault: str, error: str) -> None:
    import anthropic

    with pytest.raises(getattr(anthropic, error)) as caught:
        claude.messages.create(
            model="claude-haiku-5-5",
            max_tokens=50,
            messages=[{"role": "user", "content": "hi"}],
            extra_headers={"x-standin-fault": fault},
        )
    assert type(caught.value).__name__ == error
    if fault == "429":
        assert caught.value.response.headers["retry-after"] == "1"


def test_claude_refuses_what_todays_api_refuses(claude: Any, url: str) -> None:
    import anthropic

    ask: dict[str, Any] = {
        "model": "claude-sonnet-5-5",
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "hi"}],
    }
    for extra in ({"temperature": 0}, {"thinking": {"type": "disabled"}}, {"tool_choice": {"type": "any"}}):
        with pytest.raises(anthropic.BadRequestError):
            claude.messages.create(**ask, extra_body=extra)
    with pytest.raises(anthropic.BadRequestError, match="prefill"):
        claude.messages.create(**{**ask, "messages": [*ask["messages"], {"role": "assistant", "content": "{"}]})
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**ask, "model": "retired-claude-2"})
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="bad-key", max_retries=0).messages.create(**ask)
    old = {"anthropic-version": "2023-06-01"}
    older = {**ask, "model": "claude-haiku-4-5"}
    assert claude.messages.create(**older, extra_body={"temperature": 0}, extra_headers=old).content


def test_each_vendor_lists_its_own_models_on_the_shared_path(claude: Any, gpt: Any, gemini: Any) -> None:
    assert "claude-haiku-5-5" in {model.id for model in claude.models.list()}
    assert claude.models.retrieve("claude-haiku-5-5").id == "claude-haiku-5-5"
    assert {"gpt-6-luna", "text-embedding-3-small"} <= {model.id for model in gpt.models.list()}
    assert gpt.models.retrieve("gpt-6-luna").id == "gpt-6-luna"
    assert "models/gemini-3.8-flash" in {model.name for model in gemini.models.list()}
    assert gemini.models.get(model="gemini-3.8-flash").name == "models/gemini-3.8-flash"


# ---------------------------------------------------------------- OpenAI


def test_gpt_chat_answers_in_text_from_the_prompt(gpt: Any) -> None:
    raw = gpt.chat.completions.with_raw_response.create(
        model="gpt-6-luna",
        max_completion_tokens=500,
        messages=[{"role": "system", "content": "Be terse."}, {"role": "user", "content": QUESTION}],
    )
    done = raw.parse()
    assert "10,000" in done.choices[0].message.content
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens_details.reasoning_tokens > 0
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert int(raw.headers["x-ratelimit-remaining-requests"]) > 0
    assert raw.headers["x-request-id"]


def test_gpt_chat_obeys_a_schema(gpt: Any) -> None:
    done = gpt.chat.completions.parse(
        model="gpt-6-luna", response_format=Points, messages=[{"role": "user", "content": QUESTION}]
    )
    assert len(done.choices[0].message.parsed.points) == 3


def test_gpt_chat_truncates_and_refuses(gpt: Any) -> None:
    ask: dict[str, Any] = {
        "model": "gpt-6-luna",
        "messages": [{"role": "user", "content": QUESTION}],
        "reasoning_effort": "none",
    }
    short = gpt.chat.completions.create(**ask, max_completion_tokens=6)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 6
    refused = gpt.chat.completions.create(**ask, extra_headers={"x-standin-fault": "refuse"})
    assert refused.choices[0].message.content is None and refused.choices[0].message.refusal


def test_gpt_responses_plain_structured_truncated_refused(gpt: Any) -> None:
    ask: dict[str, Any] = {"model": "gpt-6-luna", "input": QUESTION, "instructions": "Be terse.", "store": False}
    plain = gpt.responses.create(**ask, reasoning={"effort": "none"})
    assert "10,000" in plain.output_text and plain.status == "completed"
    counted = gpt.responses.input_tokens.count(model="gpt-6-luna", input=QUESTION, instructions="Be terse.")
    assert counted.input_tokens == plain.usage.input_tokens
    assert len(gpt.responses.parse(**ask, text_format=Points).output_parsed.points) == 3
    short = gpt.responses.create(**ask, max_output_tokens=20)
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"
    refused = gpt.responses.create(**ask, extra_headers={"x-standin-fault": "refuse"})
    assert refused.output_text == "" and refused.output[-1].content[0].type == "refusal"


def test_gpt_embeds_in_both_encodings_and_any_dimensions(gpt: Any) -> None:
    texts = [PASSAGE, PASSAGE.replace("kilobytes", "KB"), "Bake the loaf at 250 degrees and let it rest."]
    result = gpt.embeddings.create(model="text-embedding-3-small", input=texts, dimensions=256)
    a, b, c = (row.embedding for row in result.data)
    assert len(a) == 256
    assert sum(x * x for x in a) == pytest.approx(1, abs=1e-5)
    assert sum(x * y for x, y in zip(a, b, strict=True)) > 0.9
    assert sum(x * y for x, y in zip(a, c, strict=True)) < 0.4
    as_numbers = gpt.embeddings.create(
        model="text-embedding-3-small", input=texts[0], dimensions=256, encoding_format="float"
    )
    assert as_numbers.data[0].embedding == pytest.approx(a, abs=1e-7)
    as_text = gpt.embeddings.create(
        model="text-embedding-3-small", input=texts[0], dimensions=256, encoding_format="base64"
    )
    assert array("f", base64.b64decode(as_text.data[0].embedding)).tolist() == pytest.approx(a, abs=1e-7)
    assert len(gpt.embeddings.create(model="text-embedding-3-small", input="x").data[0].embedding) == 1536


def test_gpt_refuses_what_todays_api_refuses(gpt: Any, url: str) -> None:
    import openai

    ask: dict[str, Any] = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(openai.BadRequestError) as caught:
        gpt.chat.completions.create(**ask, temperature=0)
    assert caught.value.code == "unsupported_value" and caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        gpt.chat.completions.create(**ask, max_tokens=5)
    assert gpt.chat.completions.create(**ask, temperature=1).choices
    assert gpt.chat.completions.create(
        **{**ask, "model": "org/any-server-model"}, temperature=0.2, max_tokens=9
    ).choices
    with pytest.raises(openai.BadRequestError):
        gpt.embeddings.create(model="text-embedding-3-small", input=["a", ""])
    with pytest.raises(openai.NotFoundError):
        gpt.chat.completions.create(**{**ask, "model": "retired-gpt-4o"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="bad-key", max_retries=0).chat.completions.create(**ask)


def test_gpt_faults_raise_the_errors_of_the_sdk(gpt: Any) -> None:
    import openai

    def fail(fault: str) -> Any:
        with pytest.raises(openai.OpenAIError) as caught:
            gpt.chat.completions.create(
                model="gpt-6-luna",
                messages=[{"role": "user", "content": "hi"}],
                extra_headers={"x-standin-fault": fault},
            )
        return caught.value

    limited = fail("429")
    assert isinstance(limited, openai.RateLimitError) and limited.code == "rate_limit_exceeded"
    assert limited.response.headers["retry-after"] == "1"
    assert fail("quota").code == "insufficient_quota"
    assert isinstance(fail("529"), openai.InternalServerError)
    assert isinstance(fail("reset"), openai.APIConnectionError)


def test_a_broken_json_fault_breaks_the_answer_and_not_the_protocol(gpt: Any) -> None:
    done = gpt.chat.completions.create(
        model="gpt-6-luna",
        messages=[{"role": "user", "content": QUESTION}],
        response_format={"type": "json_schema", "json_schema": {"name": "P", "schema": Points.model_json_schema()}},
        extra_headers={"x-standin-fault": "broken_json"},
    )
    assert done.choices[0].finish_reason == "stop"
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.choices[0].message.content)


# ---------------------------------------------------------------- Gemini


def test_gemini_plain_structured_truncated_refused(gemini: Any) -> None:
    from google.genai import types

    def ask(**config: Any) -> Any:
        return gemini.models.generate_content(
            model="gemini-3.8-flash",
            contents=QUESTION,
            config=types.GenerateContentConfig(automatic_continuation=False, **config),
        )

    plain = ask(system_instruction="Be terse.", max_output_tokens=500)
    assert "10,000" in plain.text and plain.candidates[0].finish_reason.value == "STOP"
    usage = plain.usage_metadata
    assert usage.total_token_count == (
        usage.prompt_token_count + usage.candidates_token_count + usage.thoughts_token_count
    )
    own = ask(response_mime_type="application/json", response_schema=Points)
    assert len(own.parsed.points) == 3  # Gemini's own dialect, types in upper case
    standard = ask(response_mime_type="application/json", response_json_schema=Points.model_json_schema())
    assert len(Points.model_validate_json(standard.text).points) == 3
    short = ask(max_output_tokens=20)
    assert short.candidates[0].finish_reason.value == "MAX_TOKENS"
    refused = ask(http_options=types.HttpOptions(headers={"x-standin-fault": "refuse"}))
    assert refused.text is None and refused.candidates[0].finish_reason.value == "SAFETY"


def test_gemini_counts_and_embeds(gemini: Any) -> None:
    from google.genai import types

    counted = gemini.models.count_tokens(model="gemini-3.8-flash", contents=PASSAGE)
    answered = gemini.models.generate_content(model="gemini-3.8-flash", contents=PASSAGE)
    assert counted.total_tokens == answered.usage_metadata.prompt_token_count
    found = gemini.models.embed_content(
        model="gemini-embedding-001",
        contents=["one text", "another one"],
        config=types.EmbedContentConfig(output_dimensionality=64),
    )
    assert [len(embedding.values) for embedding in found.embeddings] == [64, 64]


def test_gemini_errors(gemini: Any, url: str) -> None:
    from google import genai
    from google.genai import errors, types

    def fail(client: Any, model: str = "gemini-3.8-flash", fault: str = "") -> Any:
        options = types.HttpOptions(headers={"x-standin-fault": fault}) if fault else None
        with pytest.raises(errors.APIError) as caught:
            client.models.generate_content(
                model=model, contents="hi", config=types.GenerateContentConfig(http_options=options)
            )
        return caught.value

    limited = fail(gemini, fault="429")
    assert (limited.code, limited.status) == (429, "RESOURCE_EXHAUSTED")
    assert limited.details["error"]["details"][0]["retryDelay"] == "1s"
    assert fail(gemini, fault="500").code == 500
    assert fail(gemini, fault="529").code == 503
    assert fail(gemini, model="retired-gemini").code == 404
    bad = genai.Client(api_key="bad-key", http_options=types.HttpOptions(base_url=url, timeout=10_000))
    assert fail(bad).code == 401


# ---------------------------------------------------------------- Hub

HUB_SCRIPT = """
import json, os, sys
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

def failure(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]

def rows(*args, **more):
    return list(load_dataset(*args, streaming=True, **{"split": "train", **more}))

found = {}
found["dolly"] = rows("databricks/databricks-dolly-15k")
found["oasst"] = rows("OpenAssistant/oasst1")
found["validation"] = len(rows("OpenAssistant/oasst1", split="validation"))
found["stack"] = rows("bigcode/the-stack", data_dir="data/python", token="hf_any")
found["smol"] = rows("bigcode/the-stack-smol", data_dir="data/python", token="hf_any")
github = "codeparrot/github-code-clean"
found["github"] = rows(github, revision="refs/convert/parquet", data_dir="all-mit/partial-train")
path = f"hf://datasets/{github}@refs%2Fconvert%2Fparquet/all-all/partial-train/*.parquet"
found["by path"] = len(rows("parquet", data_files=path))
shuffled = load_dataset("databricks/databricks-dolly-15k", split="train", streaming=True)
shuffled = shuffled.shuffle(seed=1, buffer_size=99)
found["shuffled"] = [row["instruction"] for row in shuffled.take(3)]
found["gated"] = failure(lambda: rows("bigcode/the-stack", data_dir="data/python"))
found["missing"] = failure(lambda: rows("databricks/dolly-15k"))
found["script"] = failure(lambda: rows(github))
smol = "bigcode/the-stack-smol"
found["gated file"] = failure(
    lambda: hf_hub_download(smol, "data/python/data.json", repo_type="dataset", token="unaccepted-key")
)
found["missing model"] = failure(lambda: hf_hub_download("standin/nothing", "config.json"))
found["file"] = open(hf_hub_download("standin/tiny-adapter", "adapter_config.json")).read()
found["snapshot"] = sorted(os.listdir(snapshot_download("standin/tiny-adapter")))
found["whoami"] = HfApi(token="hf_any").whoami()["name"]
found["sha"] = HfApi().dataset_info("databricks/databricks-dolly-15k").sha
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real libraries get; in a process of its own, because they read their endpoint when imported."""
    pytest.importorskip("datasets")
    environment = {
        **closed_environment(),
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_hub_streams_every_repository_with_the_columns_of_the_real_one(hub: dict[str, Any]) -> None:
    assert len(hub["dolly"]) >= 60
    assert list(hub["dolly"][0]) == ["instruction", "context", "response", "category"]
    assert {"message_id", "text", "role", "lang", "review_result", "deleted", "rank"} <= set(hub["oasst"][0])
    assert {row["lang"] for row in hub["oasst"]} >= {"en", "de", "fr", "es"}
    assert any(row["deleted"] for row in hub["oasst"])
    assert hub["validation"] == 4
    assert list(hub["stack"][0])[:5] == [
        "content", "avg_line_length", "max_line_length", "alphanum_fraction", "licenses",
    ]  # fmt: skip
    assert [row["content"] for row in hub["stack"]] == [row["content"] for row in hub["smol"]]
    assert list(hub["github"][0]) == ["code", "repo_name", "path", "language", "license", "size"]
    assert {row["license"] for row in hub["github"]} == {"mit"}
    assert {row["language"] for row in hub["github"]} == {"TypeScript", "JavaScript", "Go", "Rust", "SQL", "Python"}
    assert hub["by path"] > len(hub["github"])
    assert len(set(hub["shuffled"])) == 3


def test_hub_says_why_a_dataset_does_not_load(hub: dict[str, Any]) -> None:
    assert hub["gated"][0] == "DatasetNotFoundError" and "gated" in hub["gated"][1]
    assert hub["missing"][0] == "DatasetNotFoundError" and "gated" not in hub["missing"][1]
    assert hub["script"][0] == "RuntimeError" and "scripts are no longer supported" in hub["script"][1]
    assert hub["gated file"][0] == "GatedRepoError"
    assert hub["missing model"][0] == "RepositoryNotFoundError"


def test_hub_serves_files_and_snapshots(hub: dict[str, Any]) -> None:
    assert json.loads(hub["file"])["fine_tune_type"] == "lora"
    assert hub["snapshot"] == ["README.md", "adapter_config.json", "adapters.safetensors"]
    assert hub["whoami"] == "standin"
    assert len(hub["sha"]) == 40


def test_hub_parquet_is_the_same_bytes_in_another_process() -> None:
    pytest.importorskip("pyarrow")
    repository = hub_data.repository("dataset", "OpenAssistant/oasst1")
    assert repository is not None
    code = "from shared.standin.hub_data import _oasst; print(_oasst().refs['main'].sha)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repository.refs["main"].sha


# ---------------------------------------------------------------- faults, limits, log


def test_the_same_request_gets_the_same_bytes_from_another_server(url: str) -> None:
    with start() as other:
        for body in (chat(QUESTION), chat("Compress:\n" + PASSAGE, "any/model")):
            assert post(url, body)[2] == post(other, body)[2]


def test_a_header_fault_can_end_after_some_times(url: str) -> None:
    statuses = [post(url, chat("twice, please"), {"x-standin-fault": "429*2"})[0] for _ in range(4)]
    assert statuses == [429, 429, 200, 200]


def test_seeded_faults_do_not_depend_on_concurrency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STANDIN_FAULTS", "429=0.2,529=0.1,500=0.1,truncate=0.1,refuse=0.05,retry_after=0,seed=7")
    bodies = [json.dumps(chat(f"{QUESTION} {i}")).encode() for i in range(60)]

    def outcomes(workers: int) -> list[list[Any]]:
        def one(body: bytes) -> list[Any]:
            seen: list[Any] = []
            while not seen or seen[-1] in (429, 500, 503):  # as a client retries
                status, _, data = post(found, body)
                reason = json.loads(data)["choices"][0] if status == 200 else None
                seen.append((reason["finish_reason"], reason["message"]["refusal"]) if reason else status)
            return seen

        with start() as found, ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, bodies))

    one_at_a_time = outcomes(1)
    assert outcomes(8) == one_at_a_time
    assert max(len(seen) for seen in one_at_a_time) <= faults.MOST_IN_ROW + 1  # never more than two in a row
    assert 10 < sum(len(seen) > 1 for seen in one_at_a_time) < 50
    assert any(seen[-1][0] == "length" for seen in one_at_a_time)
    assert any(seen[-1][1] for seen in one_at_a_time)


def test_content_faults_come_again_on_a_second_run() -> None:
    spec = "truncate=0.2,refuse=0.2,429=0.3,seed=3"
    first, second = faults.parse(spec), faults.parse(spec)
    for i in range(200):
        body = str(i).encode()
        last = [next(f for f in (f.decide("/p", body) for _ in range(9)) if not f.transport) for f in (first, second)]
        assert last[0] == last[1]


@pytest.mark.parametrize(
    ("spec", "said"),
    [("428=0.1", "'429'|'408'"), ("429=x", "must be a number"), ("429=0.7,500=0.7", "at most 1")],
)
def test_a_wrong_fault_setting_says_what_is_wrong(spec: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        faults.parse(spec)


def test_requests_above_the_rate_get_429_with_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_RATE", "5")
    with start() as found:
        answers = [post(found, chat("hello")) for _ in range(8)]
        limited = [answer for answer in answers if answer[0] == 429]
        assert [status for status, _, _ in answers[:5]] == [200] * 5
        assert len(limited) == 3
        assert limited[0][1]["retry-after"] == "1"
        time.sleep(int(limited[0][1]["retry-after-ms"]) / 1000 + 0.05)
        assert post(found, chat("hello"))[0] == 200


def test_latency_is_added_to_a_models_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_LATENCY_S", "0.3")
    with start() as found:
        started = time.monotonic()
        post(found, chat("hello"))
        assert time.monotonic() - started >= 0.3


def test_the_log_tells_every_request_once_and_whether_it_was_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "requests.jsonl"
    monkeypatch.setenv("STANDIN_LOG", str(log))
    body = json.dumps(chat(QUESTION)).encode()
    with start() as one, start() as two, ThreadPoolExecutor(8) as pool:  # both append to the same file
        list(pool.map(lambda i: post((one, two)[i % 2], body), range(40)))
        post(one, body, {"x-standin-fault": "500"})
        with pytest.raises(ConnectionResetError):
            post(one, body, {"x-standin-fault": "reset"})
        post(one, body, {"x-standin-fault": "truncate"})
    # A line is written after its answer, so the last ones may come a moment after the client has it.
    until = time.monotonic() + 10
    while len(lines := [json.loads(line) for line in log.read_text().splitlines()]) < 43 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(lines) == 43
    assert {line["sha256"] for line in lines} == {hashlib.sha256(body).hexdigest()}
    assert [(line["status"], line["fault"], line["served"]) for line in lines[-3:]] == [
        (500, "500", False),
        (0, "reset", False),
        (200, "truncate", True),
    ]
    assert all(line["served"] and line["model"] == "gpt-6-luna" and line["output_tokens"] > 0 for line in lines[:40])


# ---------------------------------------------------------------- the process


def alive(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/none", timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_the_child_ends_with_the_block() -> None:
    with start() as found:
        assert alive(found)
    assert not alive(found)


def test_the_child_ends_when_its_parent_is_killed() -> None:
    code = "import time; from shared.standin import start\nwith start() as url: print(url, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        found = parent.stdout.readline().strip()
        assert alive(found)
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5
    while alive(found) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(found)


def test_a_stand_in_that_does_not_come_up_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULTS", "nonsense=1")
    with pytest.raises(SettingsError, match="ended at once"), start():
        raise AssertionError("unreachable")


def test_by_hand_it_prints_the_settings_for_a_shell_and_ends_on_ctrl_c() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "shared.standin"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests started with `&` inherit it ignored
    )
    with child:
        assert child.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1].startswith("export"):
            lines.append(child.stdout.readline().strip())
        exports = dict(line.removeprefix("export ").split("=", 1) for line in lines[:-1])
        assert alive(exports["STANDIN_URL"])
        child.send_signal(signal.SIGINT)
        assert child.wait(5) == 0
    assert exports["OPENAI_BASE_URL"] == f"{exports['STANDIN_URL']}/v1"
    from shared import apis

    source = textwrap.dedent(Path(apis.__file__).read_text("utf-8"))
    wanted = {name for name in exports if name.endswith(("_BASE_URL", "_ENDPOINT"))}
    assert all(f'"{name}"' in source for name in wanted)


def test_malformed_requests_are_refused_in_the_vendors_shape(url: str) -> None:
    status, _, data = post(url, b"{not json")
    assert status == 400 and "not JSON" in json.loads(data)["error"]["message"]
    status, _, data = post(url, {"model": "m", "messages": "hi"})
    assert status == 400 and json.loads(data)["error"]["param"] == "messages"
    status, _, data = post(url, {"model": "m", "max_tokens": 5}, {"anthropic-version": "1"}, "/v1/messages")
    assert status == 400 and json.loads(data)["type"] == "error"
    status, _, _ = post(url, {"model": "m", "messages": [{"role": "user", "content": 7}]})
    assert status == 400
