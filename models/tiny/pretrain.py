"""Train the tiny model from scratch: distributions -> corpus -> tokenizer -> model -> recipe and sample.

A one-off script, kept so that the committed weights can be made again. It needs torch and transformers, which
no stage of the pipeline needs, and runs on CUDA or on a CPU (bfloat16 where asked).

    python3 -m venv trainer && trainer/bin/pip install torch transformers
    trainer/bin/pip download --no-deps --dest dists django flask trio ...   # the list is in recipe.toml
    trainer/bin/python models/tiny/pretrain.py --dists dists --out models/tiny --steps 20000

The target is `squeeze(text)`; the loss is on the answer only. Every example starts with the same system
prompt, so its keys and values are computed once a step and shared by the whole batch.
"""

import argparse
import ast
import hashlib
import json
import math
import random
import re
import tarfile
import textwrap
import time
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as fn
from squeeze import squeeze
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

Row = tuple[list[int], list[int]]  # tokens of the prompt after the system message, tokens of the answer

HERE: Final = Path(__file__).resolve().parent
PROMPTS: Final = HERE.parents[1] / "stages" / "03_compress" / "prompts"

SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, END = 0, 2  # positions in SPECIAL
BANDS: Final = ((10, 20), (20, 40), (40, 60), (60, 90))  # words
DOMAINS: Final = ("prose", "code")

# A distribution counts as permissive if every licence it names, vendored ones included, is one of these.
SPDX: Final = frozenset(("MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "PSF-2.0"))
CLASSIFIERS: Final = {
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "Python Software Foundation License": "PSF",
}
PLAIN: Final = {
    "mit": "MIT",
    "bsd": "BSD",
    "bsd-3-clause": "BSD-3-Clause",
    "apache-2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
}
# Whole distributions kept out of training and of the tokenizer: unseen by author, not by chunk.
HELD_OUT: Final = frozenset(("attrs", "click", "httpx", "kombu", "networkx", "seaborn", "trio"))

SKIPPED_PATH: Final = re.compile(r"(^|/)(_?vendor(ed)?|externals?|_distutils|node_modules|locale)(/|$)")
# Mail and web addresses, absolute paths, what looks like a secret, and interpreter sessions.
UNFIT: Final = re.compile(
    r"\S+@\S+\.\w|://|\b[\w-]+\.(org|com|net|io|dev)\b|(?<![\w.)\]])/[a-z]+\b|"
    r"BEGIN [A-Z ]*KEY|AKIA[0-9A-Z]{8}|[0-9a-f]{24}|>>>",
    re.IGNORECASE,
)
MAX_WORD: Final = 48  # characters; longer ones are links, tables and encoded data
MAX_TEXTS: Final = 2500  # per distribution and domain, so that no distribution is more than a few percent


@dataclass(frozen=True, slots=True)
class Text:
    """One function, or a few paragraphs of one document."""

    domain: str
    text: str
    dist: str
    version: str
    licence: str
    path: str


# ---- corpus ----


def read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each file of a wheel or of a source distribution."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                yield name, wheel.read(name)
    else:
        with tarfile.open(path) as sdist:
            for member in sorted(sdist.getmembers(), key=lambda m: m.name):
                handle = sdist.extractfile(member) if member.isfile() else None
                if handle:
                    yield member.name, handle.read()


def licence_of(metadata: Any) -> str | None:
    """The licence a distribution's metadata names, or None unless all of it is permissive."""
    expression = metadata["License-Expression"]
    if expression:
        return expression if set(re.split(r" AND | OR ", expression)) <= SPDX else None
    plain = PLAIN.get((metadata["License"] or "").strip().lower())
    if plain:
        return plain
    if len(metadata["License"] or "") > 8000 or (metadata["License"] or "").startswith("Files:"):
        return None  # several licences in one file, for vendored parts: not surely permissive
    named = [c.split("::")[-1].strip() for c in metadata.get_all("Classifier", []) if c.startswith("License")]
    found = [CLASSIFIERS.get(name) for name in named if name != "OSI Approved"]
    return " AND ".join(x for x in found if x) if found and all(found) else None


def functions(source: str) -> Iterator[str]:
    """Yield each function of a module, whole, with its indentation."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])


def docstrings(source: str) -> Iterator[str]:
    """Yield each docstring of a module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def is_prose(paragraph: str) -> bool:
    """True for a paragraph of words: mostly letters, no directive, no table rule."""
    letters = sum(c.isalpha() or c in " \n,.'" for c in paragraph)
    opens_markup = paragraph.lstrip().startswith(("..", "+-", "==", "|", ":", "--", "```"))
    return letters >= 0.88 * len(paragraph) and not opens_markup and len(paragraph.split()) >= 4


def passages(document: str, target_words: int = 160) -> Iterator[str]:
    """Yield runs of neighbouring prose paragraphs, each run of about `target_words` words."""
    run: list[str] = []
    for paragraph in re.split(r"\n\s*\n", document.replace("\r\n", "\n")):
        paragraph = textwrap.dedent(paragraph.strip("\n")).rstrip()
        if is_prose(paragraph):
            run.append(paragraph)
        if run and (not is_prose(paragraph) or sum(len(p.split()) for p in run) >= target_words):
            yield "\n\n".join(run)
            run = []
    if run:
        yield "\n\n".join(run)


def is_fit(text: str) -> bool:
    """True for a text of 5 words or more with ordinary characters, no address and no secret."""
    words = text.split()
    ascii_share = sum(c.isascii() for c in text) / max(1, len(text))
    return len(words) >= 5 and max(map(len, words)) <= MAX_WORD and ascii_share > 0.98 and not UNFIT.search(text)


def texts_of_file(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) for one file: functions and docstrings of Python, paragraphs of documents."""
    text = content.decode("utf-8", "replace")
    if name.endswith(".py"):
        yield from (("code", f) for f in functions(text))
        yield from (("prose", p) for d in docstrings(text) for p in passages(d))
    elif re.search(r"\.(rst|md|txt)$", name) and not re.search(r"licen[cs]e|copying|authors|notice", name.lower()):
        yield from (("prose", p) for p in passages(text))
    elif re.search(r"\.dist-info/METADATA$", name):
        yield from (("prose", p) for p in passages(text.partition("\n\n")[2]))


def texts_of_dist(path: Path, seed: int) -> list[Text]:
    """The texts of one distribution, at most MAX_TEXTS a domain; [] unless its licence is permissive."""
    files = {n: c for n, c in read_archive(path) if re.search(r"\.(py|rst|md|txt)$|METADATA$|PKG-INFO$", n)}
    header = min((n for n in files if n.endswith(("METADATA", "PKG-INFO"))), key=lambda n: n.count("/"))
    metadata = HeaderParser().parsestr(files[header].decode("utf-8", "replace"))
    licence = licence_of(metadata)
    if licence is None:
        print(f"skipped {metadata['Name']} {metadata['Version']}: licence not surely permissive")
        return []
    rng = random.Random(f"{seed} {metadata['Name']}")  # one distribution more or less changes no other's texts
    found: dict[str, list[Text]] = {domain: [] for domain in DOMAINS}
    for name, content in files.items():
        if not SKIPPED_PATH.search(name):
            for domain, text in texts_of_file(name, content):
                if is_fit(text):
                    origin = (metadata["Name"].lower(), metadata["Version"], licence, name)
                    found[domain].append(Text(domain, text, *origin))
    return [t for domain in DOMAINS for t in rng.sample(found[domain], min(MAX_TEXTS, len(found[domain])))]


def build_corpus(dists: Path, seed: int) -> tuple[list[Text], list[Text]]:
    """Return (training, held-out) texts, without duplicates and with no held-out text in training."""
    seen: set[bytes] = set()
    train: list[Text] = []
    held: list[Text] = []
    paths = [p for p in sorted(dists.iterdir()) if p.name.endswith((".whl", ".tar.gz"))]
    everything = [t for p in paths for t in texts_of_dist(p, seed)]
    for text in sorted(everything, key=lambda t: t.dist not in HELD_OUT):  # held-out first: they keep a duplicate
        key = hashlib.sha256(" ".join(text.text.split()).encode()).digest()
        if key not in seen:
            seen.add(key)
            (held if text.dist in HELD_OUT else train).append(text)
    return train, held


# ---- chunks ----


def chunk(text: str, words: int, rng: random.Random) -> str:
    """Cut `words` words out of `text`, whitespace kept: from its start, a sentence or line, or any word."""
    spans = [m.span() for m in re.finditer(r"\S+", text)]
    last = max(0, len(spans) - words)
    kind = rng.random()
    if kind < 0.4:
        first = 0
    elif kind < 0.8:
        opens = [i for i, (a, _) in enumerate(spans[: last + 1]) if i == 0 or _opens(text, a, spans[i - 1][1])]
        first = rng.choice(opens)
    else:
        first = rng.randint(0, last)
    end = spans[min(first + words, len(spans)) - 1][1]
    return text[spans[first][0] : end]


def _opens(text: str, start: int, previous_end: int) -> bool:
    """True where a line or a sentence starts at `start`, the word before ending at `previous_end`."""
    return "\n" in text[previous_end:start] or text[previous_end - 1] in ".:?!"


@dataclass(slots=True)
class Sampler:
    """Draws tokenised examples, `prose` of them prose and the others code, lengths uniform in words."""

    texts: dict[str, list[Text]]
    tokenizer: Tokenizer
    user: str  # the user prompt, with {text}
    max_tokens: int
    rng: random.Random
    prose: float = 0.5

    def text(self, low: int, high: int, domain: str | None = None) -> tuple[Text, str]:
        """A chunk of `low` to `high` words, and where it is from. A text shorter than `low` is not used."""
        pool = self.texts[domain or ("prose" if self.rng.random() < self.prose else "code")]
        while True:
            source = self.rng.choice(pool)
            piece = chunk(source.text, self.rng.randint(low, high), self.rng)
            if low <= len(piece.split()) <= high:
                return source, piece

    def encode(self, piece: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt after the system message, and of the answer with its end mark."""
        user = self.user.replace("{text}", piece)
        prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        return self.tokenizer.encode(prompt).ids, self.tokenizer.encode(squeeze(piece) + SPECIAL[END]).ids

    def batch(self, tokens: int, high: int) -> list[Row]:
        """Examples of up to `high` words, of similar length, together about `tokens` tokens with padding."""
        low = self.rng.randint(5, max(5, high - 5))
        rows: list[Row] = []
        longest = 0
        while True:
            prompt, answer = self.encode(self.text(low, min(high, low + 15))[1])
            if len(prompt) + len(answer) > self.max_tokens:
                continue
            longest = max(longest, len(prompt) + len(answer))
            rows.append((prompt, answer))
            if longest * (len(rows) + 1) > tokens:
                return rows


def train_tokenizer(texts: list[Text], size: int, rng: random.Random) -> Tokenizer:
    """Byte-level BPE of `size` tokens, learnt on texts and their compressions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(texts, rng), trainer)
    return tokenizer


def _tokenizer_texts(texts: list[Text], rng: random.Random) -> Iterable[str]:
    # Four of prose to one of code: a function is some three times as long as a passage.
    for domain, count in (("prose", 16_000), ("code", 4_000)):
        pool = [t.text for t in texts if t.domain == domain]
        for text in rng.sample(pool, min(count, len(pool))):
            yield text
            yield squeeze(text)


# ---- model ----


def new_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 with tied embeddings, four heads and two key-value heads; `--width` and `--layers` size it."""
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        intermediate_size=3 * args.width,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.width // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return Qwen3ForCausalLM(config)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run left in its `--out`."""
    weights: dict[str, torch.Tensor] = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return weights


def pad_rows(rows: list[Row], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, targets), both [rows, longest]; a target is -100 where the next token is no answer."""
    longest = max(len(p) + len(a) for p, a in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), -100)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    return tokens.to(device), targets.to(device)


def answer_logits(
    model: Qwen3ForCausalLM, system: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Logits [positions in mask, vocab] of rows that all follow `system`, which is run once and shared.

    Rows are padded on the right, so causal attention needs no padding mask.
    """
    shared = model.model(system[None], use_cache=True).past_key_values
    cache = DynamicCache()
    for i, layer in enumerate(shared.layers):
        rows = tokens.shape[0]
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
    hidden = model.model(tokens, past_key_values=cache, use_cache=True).last_hidden_state
    return model.lm_head(hidden[mask])


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then cosine decay to 2 % of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: Qwen3ForCausalLM, sampler: Sampler, system: torch.Tensor, args: argparse.Namespace) -> int:
    """Train `model` in place, leave the averaged weights in it, and return the steps taken.

    Goes on from `--out`/checkpoint.pt where a killed run left one. `--steps` may then differ: the schedule is a
    function of the step.
    """
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    checkpoint = args.out / "checkpoint.pt"
    start = time.monotonic()
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]
        sampler.rng.setstate(saved["rng"])
        print(f"goes on from step {step}")
    while step < args.steps and time.monotonic() - start < 60 * args.minutes:
        # Short texts first: copying is learnt on them, then stretched to the full length by 40 % of the run.
        grown = 1.0 if args.init else min(1.0, step / (0.4 * args.steps))
        high = int(15 + (args.words - 15) * grown)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = pad_rows(sampler.batch(args.batch_tokens, high), args.device)
        mask = targets != -100
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            logits = answer_logits(model, system, tokens, mask)
        loss = fn.cross_entropy(logits.float(), targets[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(args.ema, step / (step + 10))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter, 1 - keep)
        if step % args.report == 0:
            right = (logits.argmax(-1) == targets[mask]).float().mean().item()
            seconds = time.monotonic() - start
            print(f"step {step} {seconds:.0f} s, words <= {high}", end=", ")
            print(f"loss {loss.item():.4f}, tokens right {right:.4f}", flush=True)
        if step % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save(state | {"step": step, "rng": sampler.rng.getstate()}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average[name])
    checkpoint.unlink(missing_ok=True)
    return step


@torch.no_grad()
def exact(model: Qwen3ForCausalLM, system: torch.Tensor, rows: list[Row], device: str) -> float:
    """Share of rows whose greedy answer is the rule's.

    Greedy decoding reproduces an answer exactly when, given the right tokens so far, the likeliest next token
    is right at every position: one forward pass decides it, without generating.
    """
    hits = 0
    for i in range(0, len(rows), 20):
        tokens, targets = pad_rows(rows[i : i + 20], device)
        mask = targets != -100
        wrong = torch.zeros_like(mask)
        wrong[mask] = answer_logits(model, system, tokens, mask).argmax(-1) != targets[mask]
        hits += int((~wrong.any(1)).sum())
    return hits / len(rows)


# ---- results ----


def write_heldout(sampler: Sampler, path: Path, per_cell: int) -> None:
    """Write `per_cell` held-out texts for each domain and band, with their origin, one JSON object a line."""
    with path.open("w", encoding="utf-8") as out:
        for domain in DOMAINS:
            for low, high in BANDS:
                for _ in range(per_cell):
                    source, piece = sampler.text(low, high - 1, domain)
                    row = asdict(source) | {"text": piece, "words": len(piece.split())}
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_recipe(path: Path, texts: list[Text], args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write what the model was made from: settings, distributions with their licences, and the result."""
    keys = ["seed", "batch_tokens", "lr", "warmup", "ema", "layers", "width", "vocab", "max_tokens", "bf16"]
    keys += ["batch_seed", "words", "prose", "steps", "device"]
    lines = [
        "# Written by pretrain.py.",
        "[settings]",
        *(f"{k} = {json.dumps(getattr(args, k))}" for k in keys),
        *(f'{k} = "{path.name}"' for k in ("init", "mix") if (path := getattr(args, k))),
    ]
    lines += ["", "[result]", *(f"{k} = {json.dumps(v)}" for k, v in result.items())]
    for name, version, licence in sorted({(t.dist, t.version, t.licence) for t in texts}):
        counts = {d: sum(t.dist == name and t.domain == d for t in texts) for d in DOMAINS}
        lines += [
            "",
            "[[distribution]]",
            f'name = "{name}"',
            f'version = "{version}"',
            f'licence = "{licence}"',
        ]
        lines += [f"{d}_texts = {counts[d]}" for d in DOMAINS] + [f"held_out = {str(name in HELD_OUT).lower()}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tomllib.loads(path.read_text(encoding="utf-8"))


def save_model(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write config.json and float32 weights that transformers and mlx-lm read alike.

    Not float16: MLX computes in the stored type, and on a CPU float32 takes a third less time.
    """
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    # Transformers 5 nests the rope base; older readers and some mlx-lm versions want it at the top as well.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dists", type=Path, required=True, help="folder of downloaded wheels and source distributions")
    p.add_argument("--out", type=Path, default=HERE, help="folder for weights, tokenizer, recipe and held-out sample")
    p.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of system.txt and user.txt")
    p.add_argument("--cache", type=Path, help="file that keeps the corpus between runs; none = build it each time")
    p.add_argument("--init", type=Path, help="folder of weights to go on from, at full length; none = from scratch")
    p.add_argument("--mix", type=Path, help="folder of weights that the result is the mean with; none = off")
    p.add_argument("--prose", type=float, default=0.5, help="share of examples that are prose, 0 to 1")
    p.add_argument("--seed", type=int, default=0, help="seed of corpus, tokenizer, weights and held-out texts")
    p.add_argument("--batch-seed", type=int, default=1, help="seed of the batches: another one for each --init")
    p.add_argument("--words", type=int, default=100, help="longest text trained on, in words, 20 or more")
    p.add_argument("--steps", type=int, default=20_000, help="optimiser steps; 0 without --init = no model")
    p.add_argument("--minutes", type=float, default=1e9, help="stop training after this many minutes")
    p.add_argument("--batch-tokens", type=int, default=12_000, help="tokens in one step, padding included")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    p.add_argument("--ema", type=float, default=0.998, help="decay a step of the weight average; 0 = off")
    p.add_argument("--layers", type=int, default=4, help="transformer layers")
    p.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 4")
    p.add_argument("--vocab", type=int, default=2048, help="tokens in the vocabulary")
    p.add_argument("--max-tokens", type=int, default=900, help="longest prompt plus answer, without the system prompt")
    p.add_argument("--bf16", action="store_true", help="train in bfloat16")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    p.add_argument("--report", type=int, default=100, help="steps between progress lines")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    p.add_argument("--per-cell", type=int, default=200, help="held-out texts scored per domain and band")
    return p.parse_args()


def load_corpus(args: argparse.Namespace) -> tuple[list[Text], list[Text]]:
    """Build the corpus, or read it from `--cache` where that file exists."""
    if args.cache and args.cache.exists():
        texts = [Text(**json.loads(line)) for line in args.cache.open(encoding="utf-8")]
        return [t for t in texts if t.dist not in HELD_OUT], [t for t in texts if t.dist in HELD_OUT]
    training, held = build_corpus(args.dists, args.seed)
    if args.cache:
        args.cache.write_text("".join(json.dumps(asdict(t)) + "\n" for t in training + held), encoding="utf-8")
    return training, held


def main() -> None:
    """Load, train, evaluate, save."""
    args = arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    # ---- load ----
    training, held = load_corpus(args)
    for domain in DOMAINS:
        counts = [sum(t.domain == domain for t in texts) for texts in (training, held)]
        print(f"{domain}: {counts[0]} training texts, {counts[1]} held out")
    if args.init:
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(training, args.vocab, random.Random(args.seed))
    tokenizer.save(str(args.out / "tokenizer.json"))
    system = (args.prompts / "system.txt").read_text(encoding="utf-8")
    user = (args.prompts / "user.txt").read_text(encoding="utf-8")
    prefix = tokenizer.encode(f"<|im_start|>system\n{system}<|im_end|>\n").ids

    def sampler(texts: list[Text], seed: int) -> Sampler:
        by_domain = {d: [t for t in texts if t.domain == d] for d in DOMAINS}
        return Sampler(by_domain, tokenizer, user, args.max_tokens, random.Random(seed), args.prose)

    write_heldout(sampler(held, args.seed + 2), args.out / "heldout.jsonl", per_cell=30)
    print(f"system prompt: {len(prefix)} tokens")
    if args.steps == 0 and not args.init:
        write_recipe(args.out / "recipe.toml", training + held, args, {"steps": 0})
        return

    # ---- train ----
    model = new_model(args)
    if args.init:
        model.load_state_dict(weights_of(args.init))
    model = model.to(args.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")
    system_ids = torch.tensor(prefix, device=args.device)
    began = time.monotonic()
    steps = train(model, sampler(training, args.batch_seed), system_ids, args)

    if args.mix:  # two cycles of one model: the mean of their weights is better than either
        mean = {
            name: (a.cpu() + b) / 2
            for (name, a), b in zip(model.state_dict().items(), weights_of(args.mix).values(), strict=True)
        }
        model.load_state_dict(mean)

    # ---- evaluate and save ----
    result: dict[str, Any] = {"steps": steps, "minutes": round((time.monotonic() - began) / 60, 1)}
    model = model.eval()
    score = sampler(held, args.seed + 3)
    for domain in DOMAINS:
        for low, high in BANDS:
            rows = [score.encode(score.text(low, high - 1, domain)[1]) for _ in range(args.per_cell)]
            result[f"exact_{domain}_{low}_{high}"] = round(exact(model, system_ids, rows, args.device), 3)
            print(domain, f"{low}-{high} words: exact", result[f"exact_{domain}_{low}_{high}"], flush=True)
    write_recipe(args.out / "recipe.toml", training + held, args, result)
    save_model(model, args.out)


if __name__ == "__main__":
    main()
