"""From messages to tokens, with the tokens that are the assistant's marked: what every backend trains on.

Tokens are the chat template's own. Which of them are the assistant's is read off the template too: rendering the turns
before an answer, with the prompt for one, must give the beginning of the whole. If it does not, training would count
the wrong tokens (mlx-lm's ``mask_prompt`` then reports ``nan`` and exits 0), so nothing is trained at all.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.errors import SettingsError
from shared.records import Example, Message


class Row(NamedTuple):
    """A conversation to train on: the id of its example, its tokens, and where in them the assistant speaks."""

    example: str
    tokens: array[int]
    turns: tuple[tuple[int, int], ...]


class Rendered(NamedTuple):
    """The rows of one example, or the reason why it cannot be trained on."""

    rows: tuple[Row, ...]
    problem: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with a chat template.

    Attributes:
        tokenizer: mlx-lm's or transformers'.
        ends: tokens that end a turn.
        model: its name, for messages.
    """

    tokenizer: Any
    ends: frozenset[int]
    model: str

    def rows(self, example: Example) -> Rendered:
        """The rows of an example: one that counts every answer; one for each answer, where the template forces it.

        Templates of reasoning models show an earlier answer otherwise than it was given, without its think block. A
        model is asked for it with the block, so there every answer is trained behind the prompt it would have had.

        Raises:
            SettingsError: the template's prompt is not how the conversation begins, or it leaves answers without end.
        """
        messages = example.messages
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        whole = self._tokens(messages)
        turns = [self._turn(example, whole, place) for place in answers]
        if all(turns):
            return Rendered((self._row(example, whole, [turn for turn in turns if turn]),))
        rows = []
        for place in answers:
            tokens = self._tokens(messages[: place + 1])
            turn = self._turn(example, tokens, place)
            if turn is None:
                return self._blame(example, place)
            rows.append(self._row(example, tokens, [turn]))
        return Rendered(tuple(rows))

    def _turn(self, example: Example, tokens: list[int], place: int) -> tuple[int, int] | None:
        """Where the answer ``messages[place]`` is, its end token included; None when its prompt is not before it."""
        prompt = self._tokens(example.messages[:place], prompt=True)
        if tokens[: len(prompt)] != prompt:
            return None
        end = next((i for i in range(len(prompt), len(tokens)) if tokens[i] in self.ends), None)
        if end is None:
            raise SettingsError(
                f"example {example.id}: the chat template of {self.model} does not end the assistant's turn with one "
                f"of the model's end tokens ({sorted(self.ends)}), so it would never learn to stop",
                "set eos_token_id in the model's generation_config.json to the token its template ends a turn with",
            )
        return len(prompt), end + 1

    @staticmethod
    def _row(example: Example, tokens: list[int], turns: list[tuple[int, int]]) -> Row:
        # What a template writes behind the last end token no model is ever asked for.
        return Row(example.id, array("I", tokens[: turns[-1][1]]), tuple(turns))

    def _blame(self, example: Example, place: int) -> Rendered:
        """Whether the text or only its tokens are at fault: the first is the template's, the second the record's."""
        prompt = self._apply(example.messages[:place], prompt=True, tokenize=False)
        whole = self._apply(example.messages[: place + 1], tokenize=False)
        if whole.startswith(prompt):
            detail = f"the answer in message {place} begins with characters that merge with the prompt's last token"
            return Rendered((), "merged_tokens", detail)
        same = next(i for i, (a, b) in enumerate(zip(prompt, whole + "\0", strict=False)) if a != b)
        raise SettingsError(
            f"example {example.id}: the chat template of {self.model} does not show message {place} behind the prompt "
            f"for it: the prompt goes on with {prompt[same : same + 40]!r}, "
            f"the conversation with {whole[same : same + 40]!r}; which tokens to train on cannot be told",
            "mend the template (chat_template.jinja of the model), or choose a model whose template agrees with itself",
        )

    def _tokens(self, messages: Sequence[Message], prompt: bool = False) -> list[int]:
        return list(self._apply(messages, prompt=prompt, tokenize=True))

    def _apply(self, messages: Sequence[Message], *, prompt: bool = False, tokenize: bool) -> Any:
        turns = [message.model_dump() for message in messages]
        # As 03 and 15 ask: hybrid models get an empty think block; a template without the switch ignores it.
        how = {"enable_thinking": False, "return_dict": False}
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=tokenize, **how)
