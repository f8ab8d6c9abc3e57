"""The process that is measured: ``python -m benchmarks.asking WHAT URL CALLS CONCURRENCY PROVIDER``.

It imports what it measures and nothing else, so that its memory is what a stage's would be.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

MODELS = {
    "openai": "openai/gpt-6-luna",
    "anthropic": "anthropic/claude-haiku-5-5",
    "gemini": "gemini/gemini-3.8-flash",
    "endpoint": "endpoint/some-model",
}
SDKS = {"openai": "openai", "anthropic": "anthropic", "gemini": "google.genai", "endpoint": "openai"}


def bare(url: str, calls: int, concurrency: int) -> float:
    """Seconds that aiohttp alone needs."""
    import asyncio

    import aiohttp

    async def work() -> float:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:
            numbers = iter(range(calls))

            async def worker() -> None:
                for n in numbers:
                    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": f"Line item-{n}."}]}
                    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                        assert (await answer.json())["choices"]

            started = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(concurrency)))
            return time.perf_counter() - started

    return asyncio.run(work())


def ours(url: str, calls: int, concurrency: int, provider: str, cache: Path) -> float:
    """Seconds that ``Models.map`` needs, everything stored in ``cache`` and billed."""
    os.environ["STANDIN_URL"] = url
    from shared.llm import Models, Request, chat

    model = MODELS[provider]

    async def ask(n: int) -> int:
        reply = await models.ask(Request(model=model, messages=chat("", f"Line item-{n}.")))
        assert not reply.problem and not reply.cached, reply
        return n

    with Models(cache, "mock", "trial", "bench", "compression") as models:
        models.require(model)
        importlib.import_module(SDKS[provider])  # on nobody's clock, as aiohttp above; `wall s` has it
        started = time.perf_counter()
        done = sum(1 for _ in models.map(ask, range(calls), concurrency))
        seconds = time.perf_counter() - started
        assert done == calls == models.spending().calls
        for table in ("ledger", "replies"):
            assert models.store.rows(f"SELECT COUNT(*) AS n FROM {table}")[0]["n"] == calls
    return seconds


def main() -> None:
    what, url, calls, concurrency, provider, cache = sys.argv[1:]
    given = (url, int(calls), int(concurrency))
    seconds = bare(*given) if what == "bare" else ours(*given, provider, Path(cache))
    used = resource.getrusage(resource.RUSAGE_SELF)
    scale = 1 if sys.platform == "darwin" else 1024
    cpu = used.ru_utime + used.ru_stime
    print(json.dumps({"seconds": seconds, "cpu_s": cpu, "rss_mib": used.ru_maxrss * scale / 2**20}))


if __name__ == "__main__":
    main()
