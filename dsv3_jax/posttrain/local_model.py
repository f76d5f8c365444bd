"""Answers from a checkpoint in this process, through the serving engine."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.model_folder import find
from dsv3_jax.data.answers import AnswerTemplate
from dsv3_jax.inference.answers import Written, texts_of
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.opening import open_weights
from dsv3_jax.inference.options import EngineOptions, own_names
from dsv3_jax.inference.prompt_file import Prompt, Wishes
from dsv3_jax.inference.requests import Request
from dsv3_jax.posttrain.completions import (
    Ask,
    Completion,
    Failure,
    without_reasoning,
)
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.synthesis_options import Sampling


class LocalModel:
    """A run's model or a Hugging Face folder's."""

    def __init__(
        self,
        checkpoint: Path,
        sampling: Sampling,
        options: EngineOptions,
        *,
        step: int | None = None,
        average: bool = False,
        dtype: str | None = None,
        chat_template: Path | None = None,
    ) -> None:
        """Opens it. ValueError or OSError, one line, as `open_weights` and `AnswerTemplate`."""
        self._sampling, self._options = sampling, options
        self._weights, self._mesh, self._opened = open_weights(
            checkpoint, options, step=step, average=average, dtype=dtype
        )
        folder, tokenizer = find(checkpoint).folder, self._opened.tokenizer
        if chat_template is None:
            self._template = AnswerTemplate.of_folder(folder, tokenizer)
        else:
            self._template = AnswerTemplate.of_file(chat_template, tokenizer)
        self._end_ids = self._opened.end_ids | self._template.ends()
        self.described: Mapping[str, Any] = {
            "model": folder.name,
            "checkpoint": str(checkpoint),
            "step": self._opened.step,
        }

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Completion | Failure]]:
        """In the order in which they stand. ValueError, one line, for messages that the chat
        template refuses.
        """
        problems = {ask.problem.key: ask.problem for ask in asks}  # candidates share a prompt
        tokens = {key: self._encoded(problem) for key, problem in problems.items()}
        requests = [self._request(tokens[ask.problem.key], ask.seed) for ask in asks]
        longest = self._opened.cfg.max_length
        lengths = [min(len(one.prompt) + one.max_tokens, longest) for one in requests]
        with own_names():
            engine = Engine(self._weights, self._options.settings(lengths), self._mesh)
        wishes = Wishes(self._sampling.max_tokens, stop=self._sampling.stop)
        prompts = [Prompt(ask.problem.prompt, wishes, {}) for ask in asks]
        pairs = list(zip(prompts, requests, strict=True))
        texts = texts_of(engine, pairs, self._opened.tokenizer.token_bytes)
        for ask, text in zip(asks, texts, strict=True):
            yield ask, Failure(str(text)) if isinstance(text, ValueError) else _completion(text)

    def _encoded(self, problem: Problem) -> list[int]:
        try:
            return self._template.encode(problem.messages)
        except ValueError as error:
            raise ValueError(f"{problem.where}: {error}") from None

    def _request(self, prompt: list[int], seed: int) -> Request:
        how = self._sampling
        return Request(prompt, how.max_tokens, how.temperature, how.top_p, seed, self._end_ids)


def _completion(text: Written) -> Completion:
    answer, reasoning = without_reasoning(text.text)
    cut = text.ended in ("max_tokens", "max_length")
    return Completion(answer, reasoning, cut, len(text.logprobs))
