"""``openai.types`` by name: what is never used is never loaded.

``import openai`` loads 500 modules of types, most of them of APIs that nobody calls here: 9 MiB, and half of its 0.3 s
(openai 3.52.0). The packages among them hold nothing but lines like ``from .batch import Batch as Batch``. Here such a
package becomes a module that imports the one behind a name when the name is asked for. A package that holds anything
else is loaded as always; so are anthropic and google-genai, whose clients import most of their types themselves.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGES = ("openai.types",)
"""These, and the packages in them."""


class _ByName(ModuleType):
    """A package; ``_where``: the module, and the name in it, behind each of its names."""

    _where: dict[str, tuple[str, str]]

    def __getattr__(self, name: str) -> object:
        module, inner = self.__dict__.get("_where", {}).get(name, ("", ""))
        if not module:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(module), inner)
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._where})


class _Loader(importlib.abc.Loader):
    def __init__(self, where: dict[str, tuple[str, str]]) -> None:
        self.where = where

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _ByName(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_where"] = self.where


class _Finder(importlib.abc.MetaPathFinder):
    """Looks for packages of :data:`PACKAGES` before the usual finders do."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(name == package or name.startswith(package + ".") for package in PACKAGES):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.submodule_search_locations is None or not (spec.origin or "").endswith(".py"):
            return None
        where = _reexported(Path(str(spec.origin)).read_text("utf-8"), name)
        if where is None:
            return None
        spec.loader = _Loader(where)
        return spec


def _reexported(source: str, package: str) -> dict[str, tuple[str, str]] | None:
    """What a package's ``__init__.py`` takes from its modules; None when it does anything else."""
    where: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom):
            return None
        if node.module == "__future__":
            continue
        if node.level != 1 or node.module is None or any(alias.name == "*" for alias in node.names):
            return None
        where |= {alias.asname or alias.name: (f"{package}.{node.module}", alias.name) for alias in node.names}
    return where


def by_name() -> None:
    """From now on; does nothing the second time."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
