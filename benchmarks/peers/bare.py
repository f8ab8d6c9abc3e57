"""aiohttp with a window of workers and nothing else: the floor. Refused, it waits as long as it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp

from benchmarks.peers import Task, task


async def ask(given: Task) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    questions: Iterator[str] = iter(given.questions)

    async def worker(session: aiohttp.ClientSession) -> None:
        for question in questions:
            body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": question}]}
            while True:
                async with session.post(f"{given.url}/v1/chat/completions", json=body) as answer:
                    found = await answer.json()
                if answer.status != 429:
                    break
                await asyncio.sleep(float(answer.headers["retry-after"]))
            rows.append((question, found["choices"][0]["message"]["content"]))

    connector = aiohttp.TCPConnector(limit=given.concurrency)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(worker(session) for _ in range(given.concurrency)))
    return rows


def main() -> None:
    given = task()
    with given.clock():
        rows = asyncio.run(ask(given))
    given.done(rows)


if __name__ == "__main__":
    main()
