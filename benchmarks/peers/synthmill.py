"""Ours, whole: reply store and ledger in PLACE, limits, retries. On the clock from the first question to all closed."""

from __future__ import annotations

import os
from contextlib import ExitStack

from benchmarks.peers import task

MODEL = "openai/gpt-6-luna"


def main() -> None:
    given = task()
    os.environ |= {"APIS": "mock", "STANDIN_URL": given.url}
    from shared.llm import Models, Reply, Request, chat

    async def ask(question: str) -> Reply:
        return await models.ask(Request(model=MODEL, messages=chat("", question)))

    __import__("openai")  # as the others' imports, on nobody's clock
    with ExitStack() as opened:
        models = opened.enter_context(Models(given.place, "mock", "trial", "bench", "compression"))
        models.require(MODEL)
        with given.clock():
            replies = list(models.map(ask, given.questions, given.concurrency))
            for table in ("ledger", "replies"):  # all of it is kept, and paid from one budget
                assert models.store.rows(f"SELECT COUNT(*) AS n FROM {table}")[0]["n"] >= len(given.questions)
            opened.close()
    given.done((question, reply.text) for question, reply in replies if not reply.problem)


if __name__ == "__main__":
    main()
