"""The card of the model repository, and the example it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from card_parts import (
    BANNER,
    EXAMPLE,
    TAGS,
    Facts,
    bound,
    bullets,
    cost,
    figure,
    licence_front,
    limits,
    obligations,
    quoted,
    sources,
    table,
    words,
)

from shared.local_models import on_hub, place_of
from shared.records import Example, Message


def model_card(facts: Facts) -> str:
    """``README.md`` of the model repository."""
    train, prompt = facts.train, prompt_of(facts.examples)
    system = "".join(message.content for message in prompt[:1] if message.role == "system")
    parts = [
        f"# {facts.title}\n\n{BANNER if facts.mock else ''}{facts.description}",
        f"A LoRA adapter for `{train.base_model.name}`, trained on the synthetic data set `{facts.dataset_repo}`. "
        "`adapter_model.safetensors` is for PEFT, `mlx/` for mlx-lm: the same numbers.",
        f"## Use\n\nWith mlx-lm:\n\n```python\n{mlx_usage(facts)}```\n\nWith transformers and PEFT:\n\n"
        f"```python\n{peft_usage(facts)}```\n\n`{EXAMPLE}` holds a prompt of the test split and the answer it was held "
        "to. Use the prompts that the adapter was trained with"
        + (f"; the system prompt is\n\n{quoted(system)}" if system else "; there was no system prompt."),
        f"## Evaluation\n\n{_evaluation(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Data\n\n{sources(facts)}",
        f"## Limitations\n\n{bullets(limits(facts))}",
        f"## Cost\n\n{cost(facts)}",
        f"## Licence\n\nThe adapter: {facts.licence}. The base model: {facts.base_licence}; it is not part of this "
        f"repository. The data: see above.\n{obligations(facts)}",
    ]
    return f"---\n{_model_front(facts)}\n---\n\n" + "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _model_front(facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    candidate = facts.evaluation.contestants[0]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=facts.dataset_repo,
            dataset_name=facts.title,
            dataset_split="test",
            metric_type=name,
            metric_name=words(name),
            metric_value=interval.value,
        )
        for name, interval in sorted(candidate.metrics.items())
    ]
    licence = licence_front(facts.licence)
    data = ModelCardData(
        language=list(facts.languages),
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=facts.train.base_model.name,
        base_model_relation="adapter",
        datasets=[facts.dataset_repo],
        tags=[*TAGS, "lora", "mlx", facts.train.track, *(["stand-in"] if facts.mock else [])],
        model_name=facts.repo.rpartition("/")[2],
        eval_results=results,
    )
    return str(data.to_yaml())


def prompt_of(examples: Sequence[Example]) -> tuple[Message, ...]:
    """The messages that the example of the card asks with: a test example's, up to its last answer."""
    return _shown_example(examples).messages[:-1]


def example_file(examples: Sequence[Example]) -> dict[str, Any]:
    """What ``example.json`` holds."""
    example = _shown_example(examples)
    messages = [message.model_dump(mode="json") for message in example.messages]
    return {"messages": messages[:-1], "expected": messages[-1]["content"], "id": example.id, "split": example.split}


def _shown_example(examples: Sequence[Example]) -> Example:
    return next((example for example in examples if example.split == "test"), examples[0])


def mlx_usage(facts: Facts) -> str:
    """Python that loads and asks the adapter with mlx-lm; a test takes it from the card and runs it."""
    spec = facts.evaluation.contestants[0].model
    spec = (
        spec if on_hub(spec) or place_of(spec).is_dir() else facts.train.base_model.model
    )  # a server knew it by a name
    place, _, revision = spec.partition("@") if on_hub(spec) else (spec, "", "")
    pinned = f', revision="{revision}"' if revision else ""
    return f'''\
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from mlx_lm import generate, load

folder = Path(snapshot_download("{facts.repo}"))
model, tokenizer = load("{place}"{pinned}, adapter_path=str(folder / "mlx"))
messages = json.loads((folder / "{EXAMPLE}").read_text("utf-8"))["messages"]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
print(generate(model, tokenizer, prompt, max_tokens={facts.max_tokens}))
'''


def peft_usage(facts: Facts) -> str:
    """The same with transformers and PEFT."""
    base = facts.train.base_model
    place, _, revision = base.model.partition("@")
    pinned = f', revision="{revision}"' if revision and place == base.name else ""
    return f'''\
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(snapshot_download("{facts.repo}"))
tokenizer = AutoTokenizer.from_pretrained("{base.name}"{pinned})
model = AutoModelForCausalLM.from_pretrained("{base.name}"{pinned}, device_map="auto")
model = PeftModel.from_pretrained(model, str(folder))
messages = json.loads((folder / "{EXAMPLE}").read_text("utf-8"))["messages"]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
).to(model.device)
output = model.generate(**inputs, max_new_tokens={facts.max_tokens}, do_sample=False)
print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
'''


def _evaluation(facts: Facts) -> str:
    evaluation = facts.evaluation
    names = list(dict.fromkeys(name for contestant in evaluation.contestants for name in contestant.metrics))
    head = ["", *(f"`{contestant.name}`" for contestant in evaluation.contestants)]
    rows = [[words(n), *(figure(c.metrics.get(n)) for c in evaluation.contestants)] for n in names]
    text = (
        f"On {evaluation.data.test:,} examples of the test split, which training never saw: the value, and in brackets "
        f"its 95 % bootstrap interval. `candidate` is this adapter.\n\n{table(head, rows)}\n"
    )
    if evaluation.differences:
        others = list(evaluation.differences)
        metrics = list(dict.fromkeys(name for values in evaluation.differences.values() for name in values))
        rows = [[words(n), *(figure(evaluation.differences[o].get(n), "+") for o in others)] for n in metrics]
        shown = table(["", *(f"`{other}`" for other in others)], rows)
        text += f"\nThe candidate minus each other, paired by example:\n\n{shown}\n"
    if groups := evaluation.contestants[0].by_group:
        metrics = list(dict.fromkeys(name for values in groups.values() for name in values))
        rows = [[group, *(figure(values.get(n)) for n in metrics)] for group, values in groups.items()]
        text += f"\nThis adapter by group:\n\n{table(['', *map(words, metrics)], rows)}\n"
    gates = [
        [words(g.metric), bound(g.low), bound(g.high), f"{g.value:.3g}", "yes" if g.passed else "**no**"]
        for g in evaluation.gates
    ]
    if gates:
        text += f"\nWhat it had to reach:\n\n{table(['', 'at least', 'at most', 'reached', 'passed'], gates)}\n"
    return text


def _training(facts: Facts) -> str:
    train = facts.train
    best = train.checkpoints[0] if train.checkpoints else None
    before = "not measured" if train.valid_loss_before is None else f"{train.valid_loss_before:.4f}"
    after = "not measured" if best is None or best.valid_loss is None else f"{best.valid_loss:.4f} at step {best.step}"
    settings = train.settings.get(train.backend) or {}
    rows = [
        ["base model", f"`{train.base_model.model}`"],
        ["trained by", {"mlx": "mlx-lm, on one machine", "tinker": "Tinker"}[train.backend]],
        ["LoRA", f"rank {train.adapter.rank}, scale {train.adapter.scale:g}, {train.adapter.tensors} tensors"],
        ["modules", ", ".join(f"`{name}`" for name in sorted({m.rpartition(".")[2] for m in train.adapter.modules}))],
        ["examples", f"{train.data.train:,} train, {train.data.valid:,} valid, {train.data.test:,} test"],
        ["steps", f"{train.steps:,}, over {train.trained_tokens:,} assistant tokens; the loss is on those alone"],
        ["training loss", f"{train.train_loss:.4f} (last tenth of the steps), nats a token"],
        ["validation loss", f"{before} before, {after}, which is the checkpoint here"],
        *(
            [name.replace("_", " "), f"{value}"]
            for name, value in settings.items()
            if not isinstance(value, dict | list | str)
        ),
        ["max length", f"{train.settings.get('max_length', '')} tokens; longer conversations were left out"],
        ["seed", f"{train.settings.get('seed', '')}"],
        ["finished", f"{train.finished_at[:10]}, after {train.seconds:,.0f} s"],
        ["code", f"synthmill `{train.git}`, Python {train.python}"],
    ]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(train.packages.items()) if name in _TOLD)
    return table(["", ""], [*rows, ["packages", versions]] if versions else rows)


_TOLD = {"mlx", "mlx-lm", "tinker", "transformers", "tokenizers", "safetensors", "numpy"}
