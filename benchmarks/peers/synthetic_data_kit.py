"""Meta's synthetic-data-kit: its LLMClient on a list of messages. It keeps its answers in memory: nothing to resume."""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from synthetic_data_kit.models.llm_client import LLMClient

from benchmarks.peers import task


def main() -> None:
    given = task()
    client = LLMClient(provider="api-endpoint", api_base=f"{given.url}/v1", api_key="x", model_name="stub")
    messages = [[{"role": "user", "content": question}] for question in given.questions]
    with given.clock():
        answers = client.batch_completion(messages, batch_size=given.concurrency)
    given.done((question, answer) for question, answer in zip(given.questions, answers, strict=True) if answer)


if __name__ == "__main__":
    main()
