"""distilabel: a pipeline of two steps, its cache in PLACE. How many are asked at a time is its batch size."""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

from benchmarks.peers import task


def main() -> None:
    given = task()
    with Pipeline(name="bench", cache_dir=str(given.place)) as pipeline:
        data = [{"instruction": question} for question in given.questions]
        load = LoadDataFromDicts(data=data, batch_size=given.concurrency)
        model = OpenAILLM(model="stub", base_url=f"{given.url}/v1", api_key="x")
        load >> TextGeneration(llm=model, input_batch_size=given.concurrency)
    with given.clock():
        found = pipeline.run(use_cache=True)
    rows = found["default"]["train"]
    given.done((row["instruction"], row["generation"]) for row in rows if row["generation"])


if __name__ == "__main__":  # its steps run in processes of their own, which import this file again
    main()
