"""The OpenAI SDK's types are loaded by name: less of it, and the same of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.llm.reexports import _reexported
from shared.stage import ROOT


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_not_used_is_not_loaded() -> None:
    code = """
import sys
import shared.llm
assert "openai" not in sys.modules, "nothing is, before it is needed"
import openai
assert openai.AsyncOpenAI(api_key="x").chat.completions.create
print(sum(name.startswith("openai.types.") for name in sys.modules))
"""
    assert 10 < int(python(code)) < 120
    assert int(python(code.replace("import shared.llm\n", ""))) > 400, "the SDK loads by name itself: we need not"


def test_every_name_is_there_and_is_the_same() -> None:
    code = """
import ast, importlib, pathlib, sys
import shared.llm
import openai.types
from openai.types import Batch, chat, responses
assert Batch is importlib.import_module("openai.types.batch").Batch
seen = 0
for file in pathlib.Path(openai.types.__path__[0]).rglob("__init__.py"):
    relative = file.parent.relative_to(openai.types.__path__[0]).parts
    package = importlib.import_module(".".join(["openai.types", *relative]))
    listed = dir(package)
    for node in ast.parse(file.read_text()).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) and node.level else ():
            found = getattr(importlib.import_module(f"{package.__name__}.{node.module}"), alias.name)
            assert getattr(package, alias.asname or alias.name) is found, (package, alias.name)
            assert alias.name in listed
            seen += 1
try:
    openai.types.Nonsense
except AttributeError as error:
    assert "openai.types" in str(error) and "Nonsense" in str(error)
    print(seen)
"""
    assert int(python(code)) > 500


@pytest.mark.parametrize(
    "source",
    [
        "from .batch import Batch\nBatch.model_rebuild()\n",
        "from ..x import Y\n",
        "from . import batch\n",
        "from .a import *\n",
    ],
)
def test_a_package_that_does_anything_else_is_loaded_as_always(source: str) -> None:
    assert _reexported("from __future__ import annotations\nfrom .batch import Batch as Job\n", "p") == {
        "Job": ("p.batch", "Batch")
    }
    assert _reexported(source, "p") is None


def test_a_package_of_another_form_keeps_what_it_does(tmp_path: Path) -> None:
    package = tmp_path / "openai" / "types"
    package.mkdir(parents=True)
    (tmp_path / "openai" / "__init__.py").write_text("from . import types\n")
    (package / "__init__.py").write_text("from .batch import Batch\nADDED = Batch + 1\n")
    (package / "batch.py").write_text("Batch = 1\n")
    code = "import sys, shared.llm.reexports as r; r.by_name(); sys.path.insert(0, sys.argv[1]); import openai; "
    assert python(code + "print(openai.types.ADDED)", str(tmp_path)) == "2\n"
