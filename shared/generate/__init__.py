"""Text written by a model of ours, on this machine or behind a server: 03 compresses with it, 15 measures it.

::

    generator = MlxGenerator(settings, Sampling(temperature=0.0, max_tokens=512, seed=0), stage.services)
    with closing(GenerationStore(store_path(stage.cache, stage.apis))) as store:
        for ask, outcome in zip(asks, generator.outcomes(asks, store, stage.progress)):     # input order
            outcome = compressed_or_reason(text, outcome, by_phrase=True)                   # cleaned, or why not

Every finished text is stored, keyed by all it depends on, before it is used: asking again generates nothing.
"""

from shared.generate.cleaning import answer, clean, refusal
from shared.generate.local import MlxGenerator, MlxSettings
from shared.generate.outcome import (
    Ask,
    Outcome,
    Sampling,
    compressed_or_reason,
    from_reply,
    in_fewer_tokens,
    served,
    unfit,
)
from shared.generate.store import Finished, GenerationStore, store_path

__all__ = [
    "Ask",
    "Finished",
    "GenerationStore",
    "MlxGenerator",
    "MlxSettings",
    "Outcome",
    "Sampling",
    "answer",
    "clean",
    "compressed_or_reason",
    "from_reply",
    "in_fewer_tokens",
    "refusal",
    "served",
    "store_path",
    "unfit",
]
