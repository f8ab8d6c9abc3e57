"""bespokelabs-curator: one LLM over a list of prompts, its cache in PLACE. It saves every answer as it arrives."""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import importlib.util
import os

from benchmarks.peers import task


def main() -> None:
    given = task()
    litellm = importlib.util.find_spec("litellm")
    assert litellm is not None and litellm.submodule_search_locations
    os.environ |= {
        "CURATOR_CACHE_DIR": str(given.place),
        "CURATOR_DISABLE_RICH_DISPLAY": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "x",
        "TELEMETRY_ENABLED": "False",
        # else its first call downloads an encoding
        "TIKTOKEN_CACHE_DIR": f"{litellm.submodule_search_locations[0]}/litellm_core_utils/tokenizers",
    }
    from bespokelabs import curator

    settings = {
        "base_url": f"{given.url}/v1",
        "api_key": "x",
        "max_requests_per_minute": 10_000_000,
        "max_tokens_per_minute": 1_000_000_000,
        "max_concurrent_requests": given.concurrency,
    }
    model = curator.LLM(model_name="stub", backend="openai", backend_params=settings)
    with given.clock():
        found = model(given.questions)
    answers = [row["response"] for row in getattr(found, "dataset", found)]
    assert len(answers) <= len(given.questions)
    given.done((question, answer) for question, answer in zip(given.questions, answers, strict=False) if answer)


if __name__ == "__main__":
    main()
