"""NeMo Data Designer: a seed column of questions and one text column. It saves row groups of SAVE_EVERY (its default:
1,000) rows, and a second run resumes behind the last whole one.
"""
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import os

from benchmarks.peers import task


def main() -> None:
    given = task()
    os.environ |= {"NEMO_TELEMETRY_ENABLED": "false", "DATA_DESIGNER_HOME": str(given.place / "home")}
    import data_designer.config as dd
    import pandas as pd
    from data_designer.interface import DataDesigner

    provider = dd.ModelProvider(name="stub", endpoint=f"{given.url}/v1", provider_type="openai", api_key="x")
    designer = DataDesigner(artifact_path=str(given.place / "artifacts"), model_providers=[provider])
    if given.save_every:
        designer.set_run_config(dd.RunConfig(buffer_size=given.save_every))
    parameters = dd.ChatCompletionInferenceParams(max_parallel_requests=given.concurrency)
    model = dd.ModelConfig(alias="m", model="stub", provider="stub", inference_parameters=parameters)
    builder = dd.DataDesignerConfigBuilder(model_configs=[model])
    questions = pd.DataFrame({"question": given.questions})
    seed = given.place / "questions.parquet"
    builder.with_seed_dataset(dd.LocalFileSeedSource.from_dataframe(questions, str(seed)))
    builder.add_column(dd.LLMTextColumnConfig(name="answer", model_alias="m", prompt="{{ question }}"))
    with given.clock():
        found = designer.create(
            builder, num_records=len(given.questions), dataset_name="bench", resume=dd.ResumeMode.IF_POSSIBLE
        )
    rows = found.load_dataset()
    rows = rows[rows["answer"].notna()]
    given.done(zip(rows["question"], rows["answer"], strict=True))


if __name__ == "__main__":
    main()
