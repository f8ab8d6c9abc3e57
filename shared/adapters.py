"""LoRA adapters in the two forms people load: PEFT (transformers, vLLM) and MLX, converted both ways, counts checked.

::

    PEFT   adapter_model.safetensors   base_model.model.X.lora_A.weight [r, in], ...lora_B.weight [out, r]
    MLX    adapters.safetensors        X.lora_a [in, r], X.lora_b [r, out]

    y = W·x + scale · B·A·x      scale = lora_alpha / r in PEFT (rsLoRA: lora_alpha / √r), `scale` itself in MLX

    X = model.layers.N.self_attn.{q,k,v,o}_proj, model.layers.N.mlp.{gate,up,down}_proj, lm_head

Neither loader can be trusted to complain: mlx-lm takes a file that lacks tensors, PEFT leaves out the modules its
``target_modules`` does not name, and both go on with an adapter that is partly the base model (mlx-lm 0.32.2, peft
0.21.2). So an adapter is read whole or refused: 2 tensors for each module of each layer, nothing else, every shape as
the rank says. Needs neither MLX nor PyTorch; numbers are moved, never computed with, so bfloat16 stays what it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import SettingsError
from shared.stage import atomic, shown

if TYPE_CHECKING:
    import numpy as np

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
MLX_FILES = ("adapters.safetensors", "adapter_config.json")

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linear layers of one block of a dense model; what 14 train adapts."""
HEAD = "lm_head"

_PEFT_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MLX_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")
_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<linear>.+)")
_DTYPES = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}

_REFUSED = {
    "use_dora": "DoRA scales every column, which plain LoRA cannot say",
    "lora_bias": "a bias on lora_B has no place in MLX",
    "rank_pattern": "MLX has one rank for all modules",
    "alpha_pattern": "MLX has one scale for all modules",
    "modules_to_save": "whole modules were trained beside the adapter",
    "target_parameters": "parameters outside linear layers were adapted",
    "trainable_token_indices": "token embeddings were trained beside the adapter",
    "layers_to_transform": "only some layers are adapted",
    "layer_replication": "layers of the base model were repeated",
    "fan_in_fan_out": "weights are stored transposed",
}
"""Keys of a PEFT configuration that must be empty or false, and why."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of ``init_lora_weights`` (or their beginnings) with which PEFT changes the base model's weights too."""


class Base(NamedTuple):
    """What must be known of the model an adapter belongs to.

    Attributes:
        name: what a PEFT configuration calls it, ``Qwen/Qwen3-8B``.
        layers: number of its blocks.
        tied: whether its output matrix is its token embedding, so that ``lm_head`` is no module of its own.
        revision: commit on the Hub, ``None`` when it is not pinned there.
    """

    name: str
    layers: int
    tied: bool
    revision: str | None = None

    @classmethod
    def of(cls, directory: Path, name: str, revision: str | None = None) -> Base:
        """Read off a model's ``config.json``.

        Raises:
            SettingsError: there is none, or it says nothing about layers.
        """
        config = _json(directory / "config.json")
        layers = config.get("num_hidden_layers")
        if not isinstance(layers, int):
            raise SettingsError(
                f"{shown(directory / 'config.json')} has no num_hidden_layers", "give a dense text model, as Qwen3 is"
            )
        # Hugging Face's default when the key is missing is tied.
        return cls(name, layers, bool(config.get("tie_word_embeddings", True)), revision)


class Tensor(NamedTuple):
    """A matrix as it lies in a file; elements are unsigned integers of the width of ``dtype`` (F32, F16 or BF16)."""

    dtype: str
    bits: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter read whole.

    Attributes:
        rank: of every module.
        scale: what B·A is multiplied by.
        a, b: by module path (``model.layers.0.mlp.up_proj``, ``lm_head``), in PEFT's shapes: [r, in] and [out, r].
    """

    rank: int
    scale: float
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    @property
    def tensors(self) -> int:
        """How many there are: 2 for each module of each layer."""
        return len(self.a) + len(self.b)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """What is adapted, layers left out, sorted: ``mlp.up_proj``, ``self_attn.q_proj``, ``lm_head``."""
        return tuple(sorted({_parts(path)[1] for path in self.a}))


# ---------------------------------------------------------------- conversions


def peft_to_mlx(source: Path, target: Path, base: Base) -> Adapter:
    """Write the PEFT adapter in ``source`` into ``target`` as mlx-lm loads it.

    Raises:
        SettingsError: it is no plain LoRA adapter of ``base``; see :func:`read_peft`.
    """
    adapter = read_peft(source, base)
    write_mlx(adapter, target, base)
    return adapter


def mlx_to_peft(source: Path, target: Path, base: Base) -> Adapter:
    """Write the MLX adapter in ``source`` into ``target`` as PEFT loads it.

    Raises:
        SettingsError: it is no plain LoRA adapter of ``base``; see :func:`read_mlx`.
    """
    adapter = read_mlx(source, base)
    write_peft(adapter, target, base)
    return adapter


def normalise_peft(source: Path, target: Path, base: Base) -> Adapter:
    """Write the PEFT adapter in ``source`` anew: target modules named, ``unembed_tokens`` called ``lm_head``.

    What a training service exports often leaves ``target_modules`` empty, and PEFT then loads a part of it in silence.

    Raises:
        SettingsError: it is no plain LoRA adapter of ``base``; see :func:`read_peft`.
    """
    adapter = read_peft(source, base)
    write_peft(adapter, target, base)
    return adapter


def read_peft(source: Path, base: Base) -> Adapter:
    """The PEFT adapter in a directory.

    Raises:
        SettingsError: it is not plain LoRA (DoRA, patterns of rank or alpha, bias, saved modules), adapts the
            embeddings or a tied ``lm_head``, or has tensors that are unknown, missing or of the wrong shape.
    """
    config = _json(source / "adapter_config.json")
    if (kind := config.get("peft_type")) != "LORA":
        raise _refused(source, f"peft_type is {kind!r}, not 'LORA'")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise _refused(source, f"{key} is set: {why}")
    if config.get("bias", "none") != "none":
        raise _refused(source, f"bias is {config['bias']!r}: biases of the base model were trained too")
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.startswith(_CHANGES_THE_BASE):
        raise _refused(source, f"init_lora_weights is {initial!r}, which changes the base model's weights too")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise _refused(source, f"r is {rank!r} and lora_alpha {alpha!r}; both must be numbers, r at least 1")
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in read_tensors(source / "adapter_model.safetensors").items():
        found = _PEFT_NAME.fullmatch(name)
        if not found:
            raise _unknown(source, name)
        module = _module(source, name, found["module"], base)
        if module in sides[found["side"]]:
            raise _refused(source, f"{module} occurs twice, as lm_head and as unembed_tokens")
        sides[found["side"]][module] = tensor
    adapter = Adapter(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), sides["A"], sides["B"])
    _whole(source, adapter, base)
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(_named(HEAD if target == "unembed_tokens" else target, path) for path in adapter.a):
            raise _refused(source, f"target_modules names {target!r}, and no tensor is for it: tensors are missing")
    return adapter


def read_mlx(source: Path, base: Base) -> Adapter:
    """The MLX adapter in a directory.

    Raises:
        SettingsError: it is not plain LoRA, adapts fewer layers than ``base`` has (mlx-lm's own default is the last
            16), the embeddings or a tied ``lm_head``, or has tensors that are unknown, missing or of the wrong shape.
    """
    config = _json(source / "adapter_config.json")
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise _refused(source, f"fine_tune_type is {kind!r}, not 'lora'")
    parameters = config.get("lora_parameters") or {}
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if not isinstance(rank, int) or rank < 1 or not isinstance(scale, int | float):
        raise _refused(source, f"lora_parameters has rank {rank!r} and scale {scale!r}; both must be numbers")
    sides: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
    for name, tensor in read_tensors(source / "adapters.safetensors").items():
        found = _MLX_NAME.fullmatch(name)
        if not found:
            raise _unknown(source, name)
        module = _module(source, name, found["module"], base)
        sides[found["side"]][module] = _transposed(tensor)
    adapter = Adapter(rank, float(scale), sides["a"], sides["b"])
    _whole(source, adapter, base)
    return adapter


def write_peft(adapter: Adapter, target: Path, base: Base) -> None:
    """``adapter_model.safetensors``, then ``adapter_config.json``, into a directory made when it is missing."""
    tensors = {f"base_model.model.{path}.lora_A.weight": tensor for path, tensor in adapter.a.items()}
    tensors |= {f"base_model.model.{path}.lora_B.weight": tensor for path, tensor in adapter.b.items()}
    alpha = adapter.scale * adapter.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
        "lora_dropout": 0.0,
        # Without them PEFT adapts what it thinks usual for the architecture, and leaves out the rest in silence.
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.modules}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    _write(target, PEFT_FILES, tensors, {"format": "pt"}, config)


def write_mlx(adapter: Adapter, target: Path, base: Base) -> None:
    """``adapters.safetensors``, then ``adapter_config.json``, into a directory made when it is missing."""
    tensors = {f"{path}.lora_a": _transposed(tensor) for path, tensor in adapter.a.items()}
    tensors |= {f"{path}.lora_b": _transposed(tensor) for path, tensor in adapter.b.items()}
    _write(
        target, MLX_FILES, tensors, {"format": "mlx"}, mlx_config(adapter.rank, adapter.scale, adapter.modules, base)
    )


def mlx_config(rank: int, scale: float, modules: Iterable[str], base: Base) -> dict[str, Any]:
    """What mlx-lm must know to load an adapter, and nothing of where it was made."""
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(modules)}
    return {"fine_tune_type": "lora", "num_layers": base.layers, "lora_parameters": parameters}


# ---------------------------------------------------------------- what makes an adapter whole


def _module(source: Path, name: str, module: str, base: Base) -> str:
    """The module a tensor belongs to, under the name both forms know.

    Raises:
        SettingsError: it is not one that can be converted.
    """
    if "embed_tokens" in module and "unembed_tokens" not in module:
        raise _refused(
            source, f"{name}: the token embedding is adapted, which PEFT and MLX do not apply in the same way"
        )
    if module in ("model.unembed_tokens", HEAD):
        if base.tied:
            raise _refused(
                source,
                f"{name}: the output matrix is adapted, and that of {base.name} is its token embedding "
                "(tie_word_embeddings): MLX has no such module",
            )
        return HEAD
    layer, linear = _parts(module)
    if linear not in LINEARS:
        raise _unknown(source, name)
    if layer >= base.layers:
        raise _refused(source, f"{name}: {base.name} has {base.layers} layers, counted from 0")
    return module


def _whole(source: Path, adapter: Adapter, base: Base) -> None:
    """Let only an adapter pass that has 2 tensors for each module of each layer, all of its rank.

    Raises:
        SettingsError: this one has not.
    """
    if not adapter.a and not adapter.b:
        raise _refused(source, "it has no tensors")
    modules = {_parts(path)[1] for path in [*adapter.a, *adapter.b]}
    expected = {f"model.layers.{n}.{m}" for n in range(base.layers) for m in modules - {HEAD}} | (modules & {HEAD})
    missing = sorted(
        f"{path} {side}" for side, of in (("A", adapter.a), ("B", adapter.b)) for path in expected - set(of)
    )
    if missing:
        found = adapter.tensors
        raise _refused(
            source,
            f"{found} tensors where {2 * len(expected)} belong (2 for each of {len(modules)} modules in {base.layers} "
            f"layers); missing: {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}",
        )
    wrong = [
        f"{path} is A {adapter.a[path].bits.shape} and B {adapter.b[path].bits.shape}"
        for path in sorted(expected)
        if adapter.a[path].bits.shape[0] != adapter.rank or adapter.b[path].bits.shape[1] != adapter.rank
    ]
    if wrong:
        raise _refused(source, f"not every module has rank {adapter.rank}: {wrong[0]}")


def _parts(path: str) -> tuple[int, str]:
    """Layer and linear of a module path; layer -1 for what is outside the layers."""
    found = _LAYER.fullmatch(path)
    return (int(found["layer"]), found["linear"]) if found else (-1, path)


def _named(target: str, path: str) -> bool:
    """Whether PEFT takes an entry of ``target_modules`` to mean a module: the whole path or its end."""
    return path == target or path.endswith(f".{target}")


def _refused(source: Path, why: str) -> SettingsError:
    return SettingsError(
        f"the adapter in {shown(source)} cannot be converted: {why}",
        "train a plain LoRA adapter on all layers of a dense model; or, when tensors are missing, fetch it again",
    )


def _unknown(source: Path, name: str) -> SettingsError:
    return _refused(source, f"unknown tensor {name}; known are lora_A and lora_B of {', '.join(LINEARS)} and {HEAD}")


# ---------------------------------------------------------------- files


def _write(
    target: Path, files: tuple[str, str], tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]
) -> None:
    target.mkdir(parents=True, exist_ok=True)
    weights, description = files
    (target / description).unlink(missing_ok=True)  # comes last: while it is missing, nobody takes this for an adapter
    write_tensors(target / weights, tensors, metadata)
    with atomic(target / description) as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")


def _transposed(tensor: Tensor) -> Tensor:
    return Tensor(tensor.dtype, tensor.bits.T)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The matrices of a safetensors file, by name.

    Raises:
        SettingsError: there is no such file, it is not whole, or a tensor is no matrix of floating-point numbers.
    """
    import numpy as np
    from safetensors import SafetensorError, deserialize

    try:
        found: list[tuple[str, dict[str, Any]]] = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise SettingsError(f"there is no {shown(path)}", "give the directory of an adapter") from None
    except SafetensorError as error:
        raise SettingsError(f"{shown(path)} is not a whole safetensors file: {error}", "fetch it again") from None
    tensors = {}
    for name, tensor in found:
        if tensor["dtype"] not in _DTYPES or len(tensor["shape"]) != 2:
            raise SettingsError(
                f"{shown(path)}: {name} is {tensor['dtype']} {tensor['shape']}; "
                f"expected a matrix of {', '.join(_DTYPES)}",
                "train a plain LoRA adapter on a dense model",
            )
        bits = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        tensors[name] = Tensor(tensor["dtype"], bits)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file of matrices, whole or not at all; the same matrices give the same bytes.

    Written here because the library's own writers take the arrays of a framework, and numpy has no bfloat16. Format:
    header length (8 bytes, little endian), header (JSON, padded with spaces to 8 bytes), data in the header's order
    (https://github.com/huggingface/safetensors#format).
    """
    import numpy as np

    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # The widest first, then by name, as the library orders them: so every tensor is aligned.
    order = sorted(tensors.items(), key=lambda item: (-item[1].bits.itemsize, item[0]))
    for name, tensor in order:
        start, end = end, end + tensor.bits.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.bits.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            file.write(np.ascontiguousarray(tensor.bits).tobytes())


def _json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SettingsError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"there is no {shown(path)}", "give the directory of an adapter or model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{shown(path)} is not JSON: {error}", "fetch it again") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{shown(path)} holds no JSON object", "fetch it again")
    return value
