"""sdg_hub: a flow of a prompt block and a chat block. Told SAVE_EVERY, it saves checkpoints of that many rows."""
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import importlib.util
import json
import os

from benchmarks.peers import task


def main() -> None:
    given = task()
    litellm = importlib.util.find_spec("litellm")
    assert litellm is not None and litellm.submodule_search_locations
    os.environ |= {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "TIKTOKEN_CACHE_DIR": f"{litellm.submodule_search_locations[0]}/litellm_core_utils/tokenizers",
    }
    import pandas as pd
    from sdg_hub import Flow, FlowMetadata
    from sdg_hub.core.blocks import LLMChatBlock, PromptBuilderBlock

    prompt = given.place / "prompt.yaml"
    prompt.write_text(json.dumps([{"role": "user", "content": "{{ instruction }}"}]))  # JSON is YAML
    server = {"model": "openai/stub", "api_base": f"{given.url}/v1", "api_key": "x"}
    build = PromptBuilderBlock(
        block_name="build",
        input_cols=["instruction"],
        output_cols="messages",
        prompt_config_path=str(prompt),
        format_as_messages=True,
    )
    chat = LLMChatBlock(block_name="chat", input_cols="messages", output_cols="answer", async_mode=True, **server)
    flow = Flow(blocks=[build, chat], metadata=FlowMetadata(name="bench"))
    flow.set_model_config(**server)
    saving = {}
    if given.save_every:
        saving = {"checkpoint_dir": str(given.place / "checkpoints"), "save_freq": given.save_every}
    with given.clock():
        found = flow.generate(
            pd.DataFrame({"instruction": given.questions}), max_concurrency=given.concurrency, **saving
        )
    found = found[found["answer"].notna()]
    given.done((row["instruction"], text_of(row["answer"])) for _, row in found.iterrows())


def text_of(answer: object) -> str:
    """A chat block's answer is a text or a message that holds it."""
    return str(answer["content"]) if isinstance(answer, dict) else str(answer)


if __name__ == "__main__":
    main()
