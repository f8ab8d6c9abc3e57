"""What the Tinker stand-in trains: LoRA steps on a small model, computed for real with MLX.

Everything here is computed in float32 from what it is given and a seed, so the same calls give the same bytes. Nothing
is compiled: on a CPU the compiler takes 17 s and saves nothing. MLX wants to be called from one thread: the caller's
business (:class:`shared.standin.tinker_api.Tinker` has one for it).

::

    y = W·x + (32 / rank) · x·a·b        a [in, rank] starts random, b [rank, out] starts at 0
"""

from __future__ import annotations

import importlib.util
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from shared.adapters import HEAD, LINEARS

ALPHA = 32
"""The service's own choice, whatever the rank."""
GROUP_TOKENS = 4096
"""Tokens that go through the model at once, padding counted: bounds the memory for the logits of all of them."""

Arrays = dict[str, Any]
"""mlx arrays by name: ``model.layers.0.self_attn.q_proj.lora_a``."""


class EngineError(Exception):
    """A computation that cannot be done as asked; the message is for whoever asked."""


class Lora(NamedTuple):
    """What a training run adapts. ``unembed`` is the output matrix."""

    rank: int
    seed: int = 0
    unembed: bool = True
    mlp: bool = True
    attn: bool = True


class Adam(NamedTuple):
    """Parameters of one AdamW step. ``grad_clip_norm``: 0 = no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Datum(NamedTuple):
    """One sequence as numpy arrays of one length: what goes in, what should come next, how much that counts."""

    tokens: Any
    targets: Any
    weights: Any


class Sampling(NamedTuple):
    """How to generate. ``stop``: strings or token ids; ``None`` = the model's own end of text, ``()`` = nothing."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop: tuple[str | int, ...] | None = None
    seed: int = 0


class Sampled(NamedTuple):
    """A generated sequence, the token that ended it included; ``stopped`` is false when it ran into the limit."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


@dataclass(frozen=True)
class Adapter:
    """Weights that change what the base model says."""

    lora: Lora
    weights: Arrays

    @property
    def scale(self) -> float:
        return ALPHA / self.lora.rank


@dataclass
class Trainee:
    """An adapter in training. ``first`` and ``second`` are AdamW's moments, ``gradients`` what came in since a step."""

    adapter: Adapter
    first: Arrays = field(default_factory=dict)
    second: Arrays = field(default_factory=dict)
    steps: int = 0
    gradients: Arrays = field(default_factory=dict)


class Engine:
    """The model in a directory; loaded when it is first used.

    Args:
        directory: config, weights and tokenizer as mlx-lm loads them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._active: list[Adapter | None] = [None]

    # ------------------------------------------------------------ the base model

    @property
    def missing(self) -> str:
        """Why nothing can be computed here; ``""`` when it can."""
        for package in ("mlx_lm", "tinker"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed where the stand-in runs; make setup installs it where it can be"
        if not any(self.directory.glob("*.safetensors")) or not (self.directory / "config.json").exists():
            return f"{self.directory.name}/ has no weights (model.safetensors and config.json)"
        return ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        found: dict[str, Any] = json.loads((self.directory / "config.json").read_text("utf-8"))
        return found

    @property
    def max_length(self) -> int:
        """Tokens of a sequence at most."""
        return int(self.config["max_position_embeddings"])

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @cached_property
    def _ends(self) -> frozenset[int]:
        ends = self.config.get("eos_token_id")
        return frozenset([ends] if isinstance(ends, int) else ends or [])

    @cached_property
    def _model(self) -> Any:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        model, _ = load_model(self.directory)
        model.set_dtype(mx.float32)  # exact from float16, and faster than it on a CPU
        model.freeze()
        adapted = _adapted_class()
        for number, layer in enumerate(model.model.layers):
            for linear in LINEARS:
                parent = getattr(layer, linear.partition(".")[0])
                name = linear.partition(".")[2]
                path = f"model.layers.{number}.{linear}"
                setattr(parent, name, adapted(getattr(parent, name), path, self._active))
        mx.eval(model.parameters())
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def warm(self) -> None:
        """Load now what would be loaded with the first request."""
        from tinker.proto import tinker_public_pb2  # noqa: F401

        _ = self._model

    def _logits(self, adapter: Adapter | None, tokens: Any, cache: Any = None) -> Any:
        model = self._model
        self._active[0] = adapter
        hidden = model.model(tokens, cache)
        tied = self.config.get("tie_word_embeddings", True)
        logits = model.model.embed_tokens.as_linear(hidden) if tied else model.lm_head(hidden)
        return logits + _delta(adapter, HEAD, hidden)

    # ------------------------------------------------------------ training

    def new(self, lora: Lora) -> Trainee:
        """An adapter that does nothing yet. Its weights depend on the seed and their names alone."""
        import mlx.core as mx

        weights: Arrays = {}
        for path, outputs, inputs in self._targets(lora):
            key = mx.random.key((lora.seed << 32 | zlib.crc32(path.encode())) & (2**64 - 1))
            bound = 1 / math.sqrt(inputs)
            weights[f"{path}.lora_a"] = mx.random.uniform(-bound, bound, (inputs, lora.rank), key=key)
            weights[f"{path}.lora_b"] = mx.zeros((lora.rank, outputs))
        mx.eval(weights)
        return fresh(Adapter(lora, weights))

    def _targets(self, lora: Lora) -> Iterator[tuple[str, int, int]]:
        """Path, outputs and inputs of every matrix that is adapted."""
        wanted = {"self_attn": lora.attn, "mlp": lora.mlp}
        for number, layer in enumerate(self._model.model.layers):
            for linear in LINEARS:
                block, _, name = linear.partition(".")
                if wanted[block]:
                    weight = getattr(getattr(layer, block), name).linear.weight
                    yield f"model.layers.{number}.{linear}", *weight.shape
        if lora.unembed:
            yield HEAD, self.vocabulary, int(self.config["hidden_size"])

    def forward(self, trainee: Trainee, data: Sequence[Datum], *, backward: bool) -> tuple[list[Any], float]:
        """Log-probabilities of the targets, a float32 array for each datum, and the loss: Σ -logprob · weight.

        With ``backward`` the loss's gradients are added to the trainee's.
        """
        import mlx.core as mx
        import numpy as np

        found: dict[int, Any] = {}
        gradients = dict(trainee.gradients)
        for places in _groups(data):
            batch = _padded([data[place] for place in places])
            if backward:
                (_, logprobs), new = mx.value_and_grad(self._loss(trainee.adapter))(trainee.adapter.weights, *batch)
                for name, gradient in new.items():
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
            else:
                _, logprobs = self._loss(trainee.adapter)(trainee.adapter.weights, *batch)
            mx.eval(logprobs, gradients)
            mx.clear_cache()
            rows = np.array(logprobs)
            found |= {place: rows[row, : len(data[place].tokens)] for row, place in enumerate(places)}
        ordered = [found[place] for place in range(len(data))]
        loss = -math.fsum(float((row * datum.weights).sum()) for row, datum in zip(ordered, data, strict=True))
        if not math.isfinite(loss):
            raise EngineError(f"the loss is {loss}: training has diverged")
        if backward:
            trainee.gradients = gradients
        return ordered, loss

    def _loss(self, adapter: Adapter) -> Callable[..., tuple[Any, Any]]:
        import mlx.core as mx

        def loss_of(weights: Arrays, tokens: Any, targets: Any, counts: Any) -> tuple[Any, Any]:
            logits = self._logits(Adapter(adapter.lora, weights), tokens)
            chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            logprobs = chosen - mx.logsumexp(logits, axis=-1)
            return -(logprobs * counts).sum(), logprobs

        return loss_of

    def step(self, trainee: Trainee, adam: Adam) -> float:
        """One step of AdamW (decoupled decay, bias-corrected) with the gradients so far; their norm before clipping.

        Raises:
            EngineError: there are none, or they are not finite; nothing has changed then.
        """
        import mlx.core as mx

        gradients = trainee.gradients
        if not gradients:
            raise EngineError("there are no gradients: call forward_backward before optim_step")
        squares = mx.stack([(gradient * gradient).sum() for gradient in gradients.values()])
        norm = math.sqrt(cast(float, squares.sum().item()))
        if not math.isfinite(norm):
            raise EngineError(f"the norm of the gradients is {norm}: training has diverged")
        factor = adam.grad_clip_norm / norm if 0 < adam.grad_clip_norm < norm else 1.0
        steps = trainee.steps + 1
        first_part, second_part = 1 - adam.beta1**steps, 1 - adam.beta2**steps
        weights: Arrays = {}
        first: Arrays = {}
        second: Arrays = {}
        for name, weight in trainee.adapter.weights.items():
            gradient = gradients[name] * factor
            first[name] = adam.beta1 * trainee.first[name] + (1 - adam.beta1) * gradient
            second[name] = adam.beta2 * trainee.second[name] + (1 - adam.beta2) * gradient * gradient
            direction = (first[name] / first_part) / (mx.sqrt(second[name] / second_part) + adam.eps)
            weights[name] = weight * (1 - adam.learning_rate * adam.weight_decay) - adam.learning_rate * direction
        mx.eval(weights, first, second)
        trainee.adapter = Adapter(trainee.adapter.lora, weights)
        trainee.first, trainee.second, trainee.steps, trainee.gradients = first, second, steps, {}
        return norm

    # ------------------------------------------------------------ generation

    def sample(self, adapter: Adapter | None, prompt: Sequence[int], how: Sampling) -> Sampled:
        """One continuation of a prompt. Temperature 0 takes the likeliest token, without chance."""
        import mlx.core as mx
        import numpy as np
        from mlx_lm.models.cache import make_prompt_cache

        chance = np.random.default_rng(how.seed)
        cache = make_prompt_cache(self._model)
        tokens: list[int] = []
        logprobs: list[float] = []
        following = mx.array([list(prompt)])
        while len(tokens) < how.max_tokens:
            logits = np.array(self._logits(adapter, following, cache)[0, -1]).astype(np.float64)
            logits -= logits.max()
            logits -= np.log(np.exp(logits).sum())
            token = _chosen(logits, how, chance)
            tokens.append(token)
            logprobs.append(float(logits[token]))
            if self._stops(tokens, how.stop):
                return Sampled(tokens, logprobs, True)
            following = mx.array([[token]])
        return Sampled(tokens, logprobs, False)

    def _stops(self, tokens: list[int], stop: tuple[str | int, ...] | None) -> bool:
        if stop is None:
            return tokens[-1] in self._ends
        texts = [end for end in stop if isinstance(end, str)]
        if texts:
            text = self._tokenizer.decode(tokens, skip_special_tokens=False)
            if any(end in text for end in texts):
                return True
        return tokens[-1] in stop

    def prompt_logprobs(self, adapter: Adapter | None, prompt: Sequence[int]) -> Any:
        """Log-probability of each token of a prompt after those before it, float32; NaN for the first."""
        import mlx.core as mx
        import numpy as np

        logits = self._logits(adapter, mx.array([list(prompt)]))[:, :-1]
        targets = mx.array([list(prompt)[1:]])
        found = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        return np.concatenate([np.array([np.nan], np.float32), np.array(found[0])])


# ---------------------------------------------------------------- what is kept and exported


def fresh(adapter: Adapter) -> Trainee:
    """An adapter with an optimizer that has seen nothing."""
    import mlx.core as mx

    zeros = {name: mx.zeros_like(weight) for name, weight in adapter.weights.items()}
    return Trainee(adapter, zeros, dict(zeros))


def arrays_of(trainee: Trainee, *, optimizer: bool) -> dict[str, Any]:
    """All numbers of a trainee as numpy arrays, with or without the optimizer's; gradients are not among them."""
    import numpy as np

    parts = {"adapter": trainee.adapter.weights}
    if optimizer:
        parts |= {"first": trainee.first, "second": trainee.second}
    return {f"{part}.{name}": np.array(value) for part, of in parts.items() for name, value in of.items()}


def adapter_from(lora: Lora, arrays: Mapping[str, Any]) -> Adapter:
    """The adapter among what :func:`arrays_of` gave."""
    return Adapter(lora, _part(arrays, "adapter"))


def trainee_from(lora: Lora, arrays: Mapping[str, Any], steps: int, *, optimizer: bool) -> Trainee:
    """What :func:`arrays_of` gave, to the last bit; without ``optimizer`` its moments and steps start anew."""
    adapter = adapter_from(lora, arrays)
    if not optimizer:
        return fresh(adapter)
    return Trainee(adapter, _part(arrays, "first"), _part(arrays, "second"), steps)


def _part(arrays: Mapping[str, Any], part: str) -> Arrays:
    import mlx.core as mx

    prefix = f"{part}."
    return {name.removeprefix(prefix): mx.array(value) for name, value in arrays.items() if name.startswith(prefix)}


def peft_files(lora: Lora, arrays: Mapping[str, Any], base_model: str) -> dict[str, bytes]:
    """The two files of an export, as the service makes them: no target modules, the output matrix under its own name.

    ``arrays``: what :func:`arrays_of` gave.
    """
    import numpy as np
    from safetensors.numpy import save

    tensors = {}
    for name, value in arrays.items():
        path, _, side = name.removeprefix("adapter.").rpartition(".lora_")
        if name.startswith("adapter."):
            path = "model.unembed_tokens" if path == HEAD else path
            tensors[f"base_model.model.{path}.lora_{side.upper()}.weight"] = np.ascontiguousarray(value.T)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": None,
    }
    return {
        "adapter_config.json": json.dumps(config, indent=2).encode() + b"\n",
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
    }


# ---------------------------------------------------------------- parts


def _delta(adapter: Adapter | None, path: str, inputs: Any) -> Any:
    """What the adapter adds to the output of a matrix; 0 where it does not adapt it."""
    if adapter is None or f"{path}.lora_a" not in adapter.weights:
        return 0.0
    return adapter.scale * ((inputs @ adapter.weights[f"{path}.lora_a"]) @ adapter.weights[f"{path}.lora_b"])


def _adapted_class() -> Any:
    """A linear layer that adds what the active adapter says. A class made late: MLX may be missing."""
    import mlx.nn as nn

    class Adapted(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self, linear: Any, path: str, active: list[Adapter | None]) -> None:
            super().__init__()
            self.linear: Any = linear
            # A function, not the list itself: MLX takes lists for parts of the model.
            self.delta = lambda inputs: _delta(active[0], path, inputs)

        def __call__(self, inputs: Any) -> Any:
            return self.linear(inputs) + self.delta(inputs)  # type: ignore[no-untyped-call, unused-ignore]

    return Adapted


def _groups(data: Sequence[Datum]) -> Iterator[list[int]]:
    """Places of data that go through the model together: of like length, and not too many."""
    group: list[int] = []
    for place in sorted(range(len(data)), key=lambda place: (-len(data[place].tokens), place)):
        longest = len(data[group[0]].tokens) if group else 0
        if group and longest * (len(group) + 1) > GROUP_TOKENS:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _padded(data: Sequence[Datum]) -> tuple[Any, Any, Any]:
    """Tokens, targets and weights as arrays [data, longest]. What lies behind a sequence cannot change it."""
    import mlx.core as mx
    import numpy as np

    shape = (len(data), max(len(datum.tokens) for datum in data))
    tokens, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, datum in enumerate(data):
        length = len(datum.tokens)
        tokens[row, :length], targets[row, :length], weights[row, :length] = datum
    return mx.array(tokens), mx.array(targets), mx.array(weights)


def _chosen(logprobs: Any, how: Sampling, chance: Any) -> int:
    import numpy as np

    if how.temperature <= 0:
        return int(logprobs.argmax())
    order = np.argsort(-logprobs, kind="stable")
    if how.top_k > 0:
        order = order[: how.top_k]
    scaled = logprobs[order] / how.temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    if how.top_p < 1:
        kept = max(1, int(np.searchsorted(np.cumsum(shares), how.top_p)) + 1)
        order, shares = order[:kept], shares[:kept] / shares[:kept].sum()
    return int(order[min(int(np.searchsorted(np.cumsum(shares), chance.random(), side="right")), len(order) - 1)])
