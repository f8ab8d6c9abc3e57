"""Score the tiny model on unseen texts: exact match with the rule, word similarity, by length and domain.

Needs mlx-lm alone; a few minutes on two cores.

    python models/tiny/measure.py
    python models/tiny/measure.py --model path/to/adapted/model --per-cell 10
"""

import argparse
import difflib
import json
from pathlib import Path
from statistics import mean
from typing import Any, Final

import mlx.core as mx
from mlx_lm import batch_generate, load
from squeeze import squeeze

HERE: Final = Path(__file__).resolve().parent
PROMPTS: Final = HERE.parents[1] / "stages" / "03_compress" / "prompts"
BANDS: Final = ((10, 20), (20, 40), (40, 60), (60, 90))  # words
DOMAINS: Final = ("prose", "code")


def similarity(answer: str, target: str) -> float:
    """Share of words in common, in order: 1.0 for equal texts, 0.0 for nothing in common."""
    return difflib.SequenceMatcher(None, answer.split(), target.split(), autojunk=False).ratio()


def pick(rows: list[dict[str, Any]], domain: str, low: int, high: int, count: int) -> list[str]:
    """The first `count` texts of a domain with at least `low` and fewer than `high` words."""
    return [r["text"] for r in rows if r["domain"] == domain and low <= r["words"] < high][:count]


def answers(model: Any, tokenizer: Any, texts: list[str], system: str, user: str) -> list[str]:
    """The model's greedy answers, in the order of `texts`."""
    prompts = [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": system},
                {"role": "user", "content": user.replace("{text}", text)},
            ],
            add_generation_prompt=True,
        )
        for text in texts
    ]
    # An answer is never longer than its text; the slack lets a wrong one show itself.
    limits = [len(tokenizer.encode(text)) + 16 for text in texts]
    return list(batch_generate(model, tokenizer, prompts, max_tokens=limits).texts)


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=HERE, help="folder of the model")
    p.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl", help="texts with domain and words")
    p.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of system.txt and user.txt")
    p.add_argument("--per-cell", type=int, default=30, help="texts per domain and band, at most")
    p.add_argument("--float32", action="store_true", help="compute in float32, not in the stored float16")
    return p.parse_args()


def main() -> None:
    """Load, generate, print the table."""
    args = arguments()
    model, tokenizer = load(str(args.model))[:2]
    if args.float32:
        model.set_dtype(mx.float32)
    system = (args.prompts / "system.txt").read_text(encoding="utf-8")
    user = (args.prompts / "user.txt").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in args.heldout.open(encoding="utf-8")]
    print("| domain | words | texts | exact | similarity |\n|---|---|---|---|---|")
    for domain in DOMAINS:
        for low, high in BANDS:
            texts = pick(rows, domain, low, high, args.per_cell)
            targets = [squeeze(text) for text in texts]
            got = answers(model, tokenizer, texts, system, user)
            exact = mean(a == t for a, t in zip(got, targets, strict=True))
            alike = mean(similarity(a, t) for a, t in zip(got, targets, strict=True))
            print(f"| {domain} | {low}-{high} | {len(texts)} | {exact:.2f} | {alike:.2f} |", flush=True)


if __name__ == "__main__":
    main()
