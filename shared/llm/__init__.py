"""Ask many models many things, pay for each answer once.

::

    models = stage.models
    models.require("anthropic/claude-haiku-5-5", "openai/gpt-6-luna")     # keys and prices, before anything is spent

    async def one(record):
        return await models.ask(Request(model="openai/gpt-6-luna", messages=chat(system, record.text)))

    for record, reply in models.map(one, stage.read(RawText), concurrency=8):   # input order, bounded memory
        ...

A model is ``provider/name``: ``anthropic/``, ``openai/``, ``gemini/``, or ``endpoint/`` for any OpenAI-compatible
server. Every answer is stored, keyed by a hash of the whole request, before it is used; asking again costs nothing.
"""

from shared.llm.catalogue import Catalogue, ModelCard, Price
from shared.llm.models import Models
from shared.llm.store import Store
from shared.llm.types import Reply, Request, Spending, Usage, chat, fill

__all__ = [
    "Catalogue",
    "ModelCard",
    "Models",
    "Price",
    "Reply",
    "Request",
    "Spending",
    "Store",
    "Usage",
    "chat",
    "fill",
]
