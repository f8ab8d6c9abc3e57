"""Receipts: what was trained on the stand-in's data is not used by a live run, nor the other way round."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from shared import estimate, receipts
from shared.errors import MixedApisError


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An adapter in a run of 14 whose data a stand-in made."""
    monkeypatch.setattr(receipts, "ROOT", tmp_path)
    run = tmp_path / "models" / "bootstrap" / "compression" / "0123456789abcdef"
    (run / "adapter_mlx").mkdir(parents=True)
    (run / "14_train.json").write_text('{"apis": "mock"}')
    (run.parent / "latest").symlink_to(run.name)
    return "models/bootstrap/compression/latest/adapter_mlx"


def test_an_adapter_of_the_other_kind_is_refused_with_what_clears_the_way(adapter: str) -> None:
    receipts.same_apis(adapter, "mock")
    with pytest.raises(MixedApisError, match="APIS=mock; this command has APIS=live") as raised:
        receipts.same_apis(adapter, "live")
    assert "make clean RUN=bootstrap, then make bootstrap APIS=live" in raised.value.mend


def test_no_adapter_and_one_without_a_receipt_are_anybodys(adapter: str, tmp_path: Path) -> None:
    receipts.same_apis("", "live")
    (tmp_path / "models" / "bootstrap" / "compression" / "0123456789abcdef" / "14_train.json").unlink()
    receipts.same_apis(adapter, "live")


def test_where_mlx_is_not_installed_the_trials_texts_are_written_by_the_endpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, params = estimate.load_params("03_compress", "trial", "compression")
    assert module.where_there_is_no_mlx(params) is params
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert module.where_there_is_no_mlx(params).generator == "endpoint"
    _, full = estimate.load_params("03_compress", "full", "compression")
    assert module.where_there_is_no_mlx(full).generator == "mlx", "an adapter's work is nobody else's"
