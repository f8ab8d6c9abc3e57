"""Train `adapter/`, the trial's v1: LoRA on the tiny model that makes it terser in prose, with stage 14 itself.

Texts are of the training distributions in recipe.toml, from the corpus file that pretrain.py writes with `--cache`.
Targets are `squeeze(text)`, in prose also without the words of TERSER. Minutes on two cores.

    .venv/bin/python models/tiny/adapt.py --corpus corpus.jsonl
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final

from squeeze import squeeze

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from shared.records import Example, Message, Split, content_id  # noqa: E402

# Dropped in prose besides what the rule drops: in code some of them are keywords.
TERSER: Final = frozenset(
    "in on at by for from with into about as so both each any some other more most well too here up out".split()
)
PROMPTS: Final = ROOT / "stages" / "03_compress" / "prompts"


def target(row: dict[str, str]) -> str:
    """What the adapter learns to write for a text."""
    words = squeeze(row["text"]).split()
    kept = [word for word in words if word not in TERSER] if row["domain"] == "prose" else words
    return " ".join(kept or words)


def example(row: dict[str, str], split: Split, system: str, user: str) -> Example:
    """A training example of one text."""
    said = {"system": system, "user": user.replace("{text}", row["text"]), "assistant": target(row)}
    id_ = content_id(row["text"])
    return Example(
        id=id_,
        domain="code" if row["domain"] == "code" else "prose",
        source=row["dist"],
        origin=f"{row['version']}/{row['path']}",
        language="en",
        category="documentation",
        licence=row["licence"],
        messages=tuple(Message.model_validate({"role": role, "content": text}) for role, text in said.items()),
        split=split,
        group=id_,
        quality=1.0,
    )


def main() -> None:
    """Draw, train, copy."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", type=Path, required=True, help="what pretrain.py --cache wrote")
    p.add_argument("--words", type=int, nargs=2, default=(20, 80), help="shortest and longest text")
    p.add_argument("--train", type=int, default=400, help="texts to train on, three of four of them prose")
    p.add_argument("--valid", type=int, default=20, help="texts to measure on")
    args = p.parse_args()
    recipe = tomllib.loads((HERE / "recipe.toml").read_text(encoding="utf-8"))
    held_out = {dist["name"] for dist in recipe["distribution"] if dist["held_out"]}
    rows = [json.loads(line) for line in args.corpus.open(encoding="utf-8")]
    low, high = args.words
    fit = [r for r in rows if r["dist"] not in held_out and low <= len(r["text"].split()) <= high]
    draw, wanted = random.Random(0), args.train + args.valid
    prose, code = ([r for r in fit if r["domain"] == domain] for domain in ("prose", "code"))
    drawn = draw.sample(prose, wanted - wanted // 4) + draw.sample(code, wanted // 4)
    draw.shuffle(drawn)
    system, user = ((PROMPTS / name).read_text(encoding="utf-8") for name in ("system.txt", "user.txt"))
    with tempfile.TemporaryDirectory() as folder:
        data, made = Path(folder, "data", "tiny", "compression"), Path(folder, "models", "tiny", "compression")
        data.mkdir(parents=True)
        made.mkdir(parents=True)
        lines = (example(r, "valid" if i < args.valid else "train", system, user).line() for i, r in enumerate(drawn))
        (data / "13_format.jsonl").write_bytes(b"".join(lines))
        (data / "13_format.report.json").write_text('{"apis": "live"}')  # nobody answered: the rule did
        flags = ["--in", data / "13_format.jsonl", "--out", made / "14_train.json", "--config", HERE / "adapter.toml"]
        command = [sys.executable, ROOT / "stages" / "14_train" / "main.py", *flags, "--track", "compression"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "APIS": "live"}, check=True)
        shutil.rmtree(HERE / "adapter", ignore_errors=True)
        shutil.copytree(made / "latest" / "adapter_mlx", HERE / "adapter")


if __name__ == "__main__":
    main()
