"""datatrove: InferenceRunner against an endpoint. Saving means its request cache and chunks of SAVE_EVERY documents."""
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import gzip
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter

from benchmarks.peers import task


async def rollout(document: Any, generate: Callable[[dict[str, Any]], Awaitable[Any]]) -> Any:
    return await generate({"messages": [{"role": "user", "content": document.text}], "model": "stub"})


def written(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield row["text"], row["metadata"]["rollout_results"][0]["text"]


def main() -> None:
    given = task()
    config = InferenceConfig(
        server_type="endpoint",
        model_name_or_path="stub",
        endpoint_url=given.url,
        max_concurrent_generations=given.concurrency,
    )
    saving: dict[str, Any] = {}
    if given.save_every:
        saving = {"records_per_chunk": given.save_every, "checkpoints_local_dir": str(given.place / "checkpoints")}
    out = given.place / "out"
    runner = InferenceRunner(
        rollout_fn=rollout,
        config=config,
        output_writer=JsonlWriter(str(out), output_filename="${rank}_chunk_${chunk_index}.jsonl"),
        **saving,
    )
    documents = [Document(text=question, id=str(n)) for n, question in enumerate(given.questions)]
    with given.clock():
        LocalPipelineExecutor(pipeline=[documents, runner], logging_dir=str(given.place / "logs"), tasks=1).run()
    given.done(written(out))


if __name__ == "__main__":
    main()
