"""Adapters between PEFT and MLX: the numbers, the names, the counts, and all that is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.adapters import (
    LINEARS,
    Base,
    Tensor,
    mlx_to_peft,
    normalise_peft,
    peft_to_mlx,
    read_mlx,
    read_peft,
    read_tensors,
    write_tensors,
)
from shared.errors import SettingsError
from tests.tiny_qwen3 import HIDDEN, LAYERS, RANK, VOCABULARY, make_adapter, make_model

HAS_MLX = importlib.util.find_spec("mlx_lm") is not None
if not HAS_MLX:
    warnings.warn("mlx-lm is not installed: adapters are NOT COMPARED with it; `make setup` installs it", stacklevel=1)
needs_mlx = pytest.mark.skipif(not HAS_MLX, reason="mlx-lm is not installed: adapters are NOT COMPARED with it")
HAS_PEFT = all(importlib.util.find_spec(name) is not None for name in ("torch", "peft", "transformers"))
if not HAS_PEFT:
    warnings.warn(
        "torch and peft are not installed: adapters are NOT COMPARED with transformers + peft; "
        "they are in the dependency group `parity`",
        stacklevel=1,
    )
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="group `parity` is not installed: NOT COMPARED with peft")

TOLERANCE = 1e-4
BASE = Base("acme/tiny", LAYERS, tied=False)
TIED = BASE._replace(tied=True)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = [1, 5, 9, 200, 31, 77, 300, 12, 8, 440, 2, 60]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def mlx(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "mlx")


@pytest.fixture
def peft(tmp_path: Path, mlx: Path) -> Path:
    mlx_to_peft(mlx, tmp_path / "peft", BASE)
    return tmp_path / "peft"


def config_of(adapter: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of an adapter, with changes made to the file."""
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text("utf-8")) | changes
    (adapter / CONFIG).write_text(json.dumps(config), "utf-8")
    return config


def change_weights(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a file in place."""
    tensors = dict(load_file(file))
    change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)


def with_head(peft: Path, name: str = "lm_head") -> None:
    """Let an adapter change the output matrix too."""
    rng = np.random.default_rng(7)

    def add(tensors: dict[str, Any]) -> None:
        at = f"base_model.model.{name}"
        tensors[f"{at}.lora_A.weight"] = (rng.standard_normal((RANK, HIDDEN)) * 0.1).astype(np.float32)
        tensors[f"{at}.lora_B.weight"] = (rng.standard_normal((VOCABULARY, RANK)) * 0.1).astype(np.float32)

    change_weights(peft / WEIGHTS, add)


# ---------------------------------------------------------------- names, shapes, counts


def test_mlx_tensors_get_pefts_names_and_shapes(mlx: Path, tmp_path: Path) -> None:
    adapter = mlx_to_peft(mlx, tmp_path / "peft", BASE)
    assert adapter.tensors == 2 * len(LINEARS) * LAYERS
    before, after = load_file(mlx / "adapters.safetensors"), load_file(tmp_path / "peft" / WEIGHTS)
    assert len(after) == len(before) == adapter.tensors
    for name, tensor in before.items():
        module, _, side = name.rpartition(".lora_")
        assert np.array_equal(after[f"base_model.model.{module}.lora_{side.upper()}.weight"], tensor.T)
    config = config_of(tmp_path / "peft")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, 4 * RANK, "acme/tiny")
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)


def test_there_and_back_gives_the_same_bytes(mlx: Path, peft: Path, tmp_path: Path) -> None:
    peft_to_mlx(peft, tmp_path / "mlx2", BASE)
    mlx_to_peft(tmp_path / "mlx2", tmp_path / "peft2", BASE)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "peft2" / name).read_bytes() == (peft / name).read_bytes()
    back = load_file(tmp_path / "mlx2" / "adapters.safetensors")
    assert all(np.array_equal(back[name], tensor) for name, tensor in load_file(mlx / "adapters.safetensors").items())
    assert config_of(tmp_path / "mlx2") == {
        "fine_tune_type": "lora",
        "num_layers": LAYERS,
        "lora_parameters": {"rank": RANK, "scale": 4.0, "dropout": 0.0, "keys": sorted(LINEARS)},
    }


def test_the_scale_is_alpha_by_rank_and_by_its_root_for_rslora(peft: Path) -> None:
    config_of(peft, lora_alpha=6)
    assert read_peft(peft, BASE).scale == 6 / RANK
    config_of(peft, use_rslora=True)
    assert read_peft(peft, BASE).scale == 6 / math.sqrt(RANK)


def test_a_scale_that_no_whole_alpha_gives_survives(mlx: Path, tmp_path: Path) -> None:
    config = config_of(mlx)
    config_of(mlx, lora_parameters=config["lora_parameters"] | {"scale": 1.3})
    mlx_to_peft(mlx, tmp_path / "peft", BASE)
    assert read_peft(tmp_path / "peft", BASE).scale == pytest.approx(1.3, rel=1e-15)


def test_an_export_is_normalised_to_named_target_modules_and_lm_head(peft: Path, tmp_path: Path) -> None:
    with_head(peft, "model.unembed_tokens")
    config_of(peft, target_modules=None)
    adapter = normalise_peft(peft, tmp_path / "whole", BASE._replace(revision="f" * 40))
    assert adapter.tensors == 2 * len(LINEARS) * LAYERS + 2
    config = config_of(tmp_path / "whole")
    assert config["target_modules"][2:4] == ["k_proj", "lm_head"] and config["revision"] == "f" * 40
    assert "base_model.model.lm_head.lora_A.weight" in load_file(tmp_path / "whole" / WEIGHTS)


def test_bfloat16_is_moved_bit_by_bit(peft: Path, tmp_path: Path) -> None:
    tensors = read_tensors(peft / WEIGHTS)
    halves = {name: Tensor("BF16", (of.bits >> 16).astype("<u2")) for name, of in tensors.items()}
    write_tensors(peft / WEIGHTS, halves, {"format": "pt"})
    peft_to_mlx(peft, tmp_path / "mlx2", BASE)
    after = read_tensors(tmp_path / "mlx2" / "adapters.safetensors")
    for name, half in halves.items():
        module = name.removeprefix("base_model.model.").removesuffix(".weight").replace("lora_A", "lora_a")
        tensor = after[module.replace("lora_B", "lora_b")]
        assert tensor.dtype == "BF16" and np.array_equal(tensor.bits, half.bits.T)


def test_what_is_written_safetensors_own_reader_reads(tmp_path: Path) -> None:
    values: dict[str, Any] = {"wide": np.arange(6, dtype=np.float32).reshape(2, 3), "thin": np.ones((1, 5), np.float16)}
    raw = {name: Tensor("F32" if v.itemsize == 4 else "F16", v.view(f"<u{v.itemsize}")) for name, v in values.items()}
    write_tensors(tmp_path / "a.safetensors", raw, {"format": "pt"})
    read = load_file(tmp_path / "a.safetensors")
    assert all(np.array_equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items())


def test_the_base_is_read_off_the_models_config(model: Path, tmp_path: Path) -> None:
    assert Base.of(model, "acme/tiny") == BASE
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3, "tie_word_embeddings": true}', "utf-8")
    assert Base.of(tmp_path, "x", "c") == Base("x", 3, True, "c")
    (tmp_path / "config.json").write_text('{"text_config": {}}', "utf-8")
    with pytest.raises(SettingsError, match="num_hidden_layers"):
        Base.of(tmp_path, "x")


# ---------------------------------------------------------------- what is refused

REFUSED_KEYS: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "modules_to_save": ["embed_tokens"],
    "target_parameters": ["experts.w1"],
    "trainable_token_indices": [1],
    "layers_to_transform": [0],
    "fan_in_fan_out": True,
    "bias": "all",
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "LOHA",
    "r": None,
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_configuration_mlx_cannot_say_is_refused(peft: Path, tmp_path: Path, key: str) -> None:
    config_of(peft, **{key: REFUSED_KEYS[key]})
    with pytest.raises(SettingsError, match=rf"\b{key}\b"):
        peft_to_mlx(peft, tmp_path / "mlx2", BASE)
    assert not (tmp_path / "mlx2").exists()


A0 = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
Change = Callable[[dict[str, Any]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "one tensor is missing": (lambda t: t.pop(A0), "27 tensors where 28 belong .*layers.0.mlp.up_proj A"),
    "a layer is missing": (lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n], "14 tensors where 28 belong"),
    "a module is missing": (lambda t: [t.pop(n) for n in list(t) if "up_proj" in n], "target_modules names 'up_proj'"),
    "all is missing": (lambda t: t.clear(), "no tensors"),
    "a rank differs": (lambda t: t.update({A0: t[A0][:2]}), "not every module has rank 4"),
    "a layer too many": (lambda t: t.update({A0.replace("s.0.", "s.2."): t[A0]}), "2 layers, counted from 0"),
    "an expert": (lambda t: t.update({A0.replace("mlp", "mlp.experts.0"): t[A0]}), "unknown tensor .*experts"),
    "a norm": (lambda t: t.update({"base_model.model.model.norm.weight": t[A0]}), "unknown tensor .*norm"),
    "DoRA's vector": (
        lambda t: t.update({A0.replace("lora_A", "lora_magnitude_vector"): t[A0]}),
        "unknown tensor .*magnitude",
    ),
    "the embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_A.weight": t[A0]}),
        "token embedding is adapted",
    ),
    "the embedding as PEFT names it": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A0]}),
        "unknown tensor .*lora_embedding_A",
    ),
    "a vector": (lambda t: t.update({A0: t[A0][0]}), "expected a matrix"),
    "whole numbers": (lambda t: t.update({A0: t[A0].astype(np.int32)}), "expected a matrix of F32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_are_not_an_adapters_are_refused(peft: Path, tmp_path: Path, name: str) -> None:
    change, says = BROKEN[name]
    change_weights(peft / WEIGHTS, change)
    with pytest.raises(SettingsError, match=says):
        peft_to_mlx(peft, tmp_path / "mlx2", BASE)
    assert not (tmp_path / "mlx2").exists()


@pytest.mark.parametrize("name", ["lm_head", "model.unembed_tokens"])
def test_an_adapted_output_matrix_is_refused_when_it_is_the_embedding(peft: Path, tmp_path: Path, name: str) -> None:
    with_head(peft, name)
    with pytest.raises(SettingsError, match="tie_word_embeddings"):
        peft_to_mlx(peft, tmp_path / "mlx2", TIED)
    assert peft_to_mlx(peft, tmp_path / "mlx2", BASE).modules[0] == "lm_head"


def test_two_output_matrices_are_refused(peft: Path, tmp_path: Path) -> None:
    with_head(peft)
    with_head(peft, "model.unembed_tokens")
    with pytest.raises(SettingsError, match="twice"):
        peft_to_mlx(peft, tmp_path / "mlx2", BASE)


def test_an_output_matrix_that_is_only_named_is_missing(peft: Path) -> None:
    config_of(peft, target_modules=["q_proj", "lm_head"])
    with pytest.raises(SettingsError, match="names 'lm_head'"):
        read_peft(peft, BASE)


def test_an_mlx_adapter_of_the_last_layers_only_is_refused(mlx: Path) -> None:
    change_weights(
        mlx / "adapters.safetensors", lambda tensors: [tensors.pop(n) for n in list(tensors) if ".layers.0." in n]
    )
    with pytest.raises(SettingsError, match="14 tensors where 28 belong"):
        read_mlx(mlx, BASE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fine_tune_type": "dora"}, "'dora'"),
        ({"fine_tune_type": "full"}, "'full'"),
        ({"lora_parameters": {"rank": 4, "alpha": 16}}, "scale None"),
        ({"lora_parameters": {"rank": 8, "scale": 4.0}}, "not every module has rank 8"),
    ],
)
def test_an_mlx_adapter_that_is_no_plain_lora_is_refused(mlx: Path, changes: dict[str, Any], says: str) -> None:
    config_of(mlx, **changes)
    with pytest.raises(SettingsError, match=says):
        read_mlx(mlx, BASE)


def test_an_mlx_adapter_of_the_embedding_is_refused(mlx: Path) -> None:
    name = "model.layers.0.mlp.up_proj.lora_a"
    change_weights(mlx / "adapters.safetensors", lambda t: t.update({"model.embed_tokens.lora_a": t[name]}))
    with pytest.raises(SettingsError, match="token embedding is adapted"):
        read_mlx(mlx, BASE)


def test_files_that_are_missing_or_cut_off_are_told(peft: Path, tmp_path: Path) -> None:
    whole = (peft / WEIGHTS).read_bytes()
    (peft / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(SettingsError, match="not a whole safetensors file"):
        read_peft(peft, BASE)
    (peft / WEIGHTS).unlink()
    with pytest.raises(SettingsError, match=r"there is no .*adapter_model"):
        read_peft(peft, BASE)
    (peft / CONFIG).write_text("{", "utf-8")
    with pytest.raises(SettingsError, match="is not JSON"):
        read_peft(peft, BASE)
    with pytest.raises(SettingsError, match="there is no "):
        read_peft(tmp_path / "nowhere", BASE)


# ---------------------------------------------------------------- the same numbers as the models give


def mlx_logits(model: Path, adapter: Path | None = None) -> Any:
    import mlx.core as mx
    from mlx_lm import load

    loaded = load(str(model), adapter_path=str(adapter) if adapter else None)[0]
    return np.array(loaded(mx.array([TOKENS])))[0]


def merged(model: Path, peft: Path, target: Path) -> Path:
    """The base with the deltas of a PEFT adapter added by PEFT's formula: W + lora_alpha / r · B·A."""
    config = json.loads((peft / CONFIG).read_text("utf-8"))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    shutil.copytree(model, target)
    weights, tensors = dict(load_file(model / "model.safetensors")), load_file(peft / WEIGHTS)
    for name in [name for name in tensors if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = (tensors[name.replace("lora_A", f"lora_{side}")].astype(np.float64) for side in "AB")
        weight = f"{module.replace('model.unembed_tokens', 'lm_head')}.weight"
        weights[weight] = (weights[weight] + scale * (b @ a)).astype(np.float32)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@needs_mlx
@pytest.mark.parametrize("head", ["", "model.unembed_tokens"])
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_those_of_the_base_with_the_deltas_merged(
    model: Path, peft: Path, tmp_path: Path, head: str, rslora: bool
) -> None:
    config_of(peft, use_rslora=rslora)
    if head:
        with_head(peft, head)
    peft_to_mlx(peft, tmp_path / "mlx2", BASE)
    adapted = mlx_logits(model, tmp_path / "mlx2")
    expected = mlx_logits(merged(model, peft, tmp_path / "merged"))
    assert np.abs(adapted - expected).max() <= TOLERANCE
    assert np.abs(adapted - mlx_logits(model)).max() > 1000 * TOLERANCE, "the adapter must matter, or nothing is shown"


@needs_mlx
def test_a_peft_adapter_made_from_mlx_gives_the_logits_mlx_gives(
    model: Path, mlx: Path, peft: Path, tmp_path: Path
) -> None:
    expected = mlx_logits(merged(model, peft, tmp_path / "merged"))
    assert np.abs(mlx_logits(model, mlx) - expected).max() <= TOLERANCE


@needs_mlx
@needs_peft
@pytest.mark.parametrize("head", ["", "model.unembed_tokens"])
def test_logits_are_those_of_transformers_and_peft(model: Path, peft: Path, tmp_path: Path, head: str) -> None:
    torch: Any = importlib.import_module("torch")
    peft_library: Any = importlib.import_module("peft")
    from transformers import AutoModelForCausalLM

    if head:
        with_head(peft, head)
        normalise_peft(peft, tmp_path / "whole", BASE)
        peft = tmp_path / "whole"
    peft_to_mlx(peft, tmp_path / "mlx2", BASE)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor([TOKENS])).logits[0].numpy()
        adapted = peft_library.PeftModel.from_pretrained(base, peft)(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(mlx_logits(model, tmp_path / "mlx2") - adapted).max() <= TOLERANCE
    assert np.abs(adapted - plain).max() > 1000 * TOLERANCE
