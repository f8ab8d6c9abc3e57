"""The models that the full run is trained on and generates with, as the stand-in Hub has them: the tiny model.

Its real weights, tokenizer and chat template lie under the real names, at ``main`` and at every commit, so a run with
``APIS=mock`` loads and trains what the settings pin without a download of gigabytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from shared.standin.hub_data import Repository, Snapshot

TINY = Path(__file__).resolve().parent.parent.parent / "models" / "tiny"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MODELS = {
    "Qwen/Qwen3-8B": "b968826d9c46dd6066d109eabc6255188de91218",
    "mlx-community/Qwen3-8B-4bit": "545dc4251c05440727734bcd94334791f6ab0192",
    "mlx-community/Qwen3-4B-Instruct-2507-8bit": "0e42af58449718de7931ee04f28191fbe6c43a56",
}
"""Repository ids, and the commit that ``main`` is: where the real one was when the settings were written."""


def repository(kind: str, repo_id: str) -> Repository | None:
    """The repository of a model; None when it is not one of :data:`MODELS`."""
    return _repository(repo_id) if kind == "model" and repo_id in MODELS else None


@cache
def _repository(repo_id: str) -> Repository:
    card = f"---\nlicense: apache-2.0\n---\n\n# {repo_id}\n\nThe tiny model of this repository, under that name.\n"
    files = {"README.md": card.encode()} | {name: (TINY / name).read_bytes() for name in FILES}
    snapshot = Snapshot(files, frozenset({"model.safetensors"}), MODELS[repo_id])
    return Repository({"main": snapshot}, any_commit=True)
