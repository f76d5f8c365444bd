"""Answers of a model in training, by the serving engine: its weights are handed over in memory.

The engine is made once and takes the weights of every step, so nothing is compiled from step to
step. It is a steady one: what is drawn is a function of (weights, prompt, seed) alone, to the bit,
and the seed one of (run, batch, prompt, place in the group); a resumed run draws the same.

The weights are those that a training step multiplies with: in its dtype, and where a recipe
quantises them, rounded as there. What FP8 rounds beside them (inputs of linears) is not, nor do
answers pass the same programs as training rows: a difference of log-probabilities remains, which is
to be watched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.config.fields import check
from dsv3_jax.data.hashing import key64
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import check_sampling
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.inference.text import TextStream
from dsv3_jax.inference.weights import Weights, lay_out
from dsv3_jax.model.precision import class_of, is_linear
from dsv3_jax.parallel.mesh import parameter_name
from dsv3_jax.posttrain.attempts import Attempt
from dsv3_jax.posttrain.completions import without_reasoning
from dsv3_jax.posttrain.rl_prompts import PromptSet
from dsv3_jax.quant.recipes import recipe_of
from dsv3_jax.train.step import TrainState

_SHORT = 512  # texts of at most so many tokens get small pages
_PAGE_SLOTS = 16, 64  # of short texts and others: of the last page, half is empty on the average


class Output(NamedTuple):
    """One answer."""

    tokens: list[int]
    """The one that ended it included, if one did"""
    logprobs: list[float]
    """Of each token at temperature 1, whatever it was drawn at"""
    ended: bool
    """By the model; else by its length"""
    text: str
    """Without the token that ended it"""


class Group(NamedTuple):
    """Answers to one prompt, in the order of their places."""

    prompt: int
    """Its place in the set"""
    outputs: list[Output]

    @classmethod
    def of_json(cls, read: Sequence[Any]) -> "Group":
        """The way back from `json.dumps`."""
        prompt, outputs = read
        return cls(prompt, [Output(*output) for output in outputs])


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    group: int
    """G: answers to a prompt"""
    max_tokens: int
    """Of an answer, its end included"""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    """The run's"""
    rows: int = 64
    """Answers that are written at the same time"""

    def __post_init__(self) -> None:
        for name in ("group", "max_tokens", "rows"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_sampling(self.seed, self.temperature, self.top_p)

    def seed_of(self, batch: int, place: int, prompt: int, number: int) -> int:
        """Of answer `number` to the prompt at `place` of a batch; 0 to 2^32 - 1."""
        return key64(f"rollout {batch} {place} {prompt}", self.seed, number) % 2**32


class Rollouts:
    """Of one run, on the first device."""

    def __init__(
        self,
        cfg: RunConfig,
        graphdef: nnx.GraphDef,
        tokenizer: Tokenizer,
        prompts: PromptSet,
        drawing: Drawing,
        end_ids: frozenset[int],
    ) -> None:
        """ValueError, one line, for prompts and answers that are longer than the model."""
        self.prompts, self.drawing, self.end_ids = prompts, drawing, end_ids
        self._token_bytes = tokenizer.token_bytes
        longest = prompts.longest + drawing.max_tokens
        if longest > cfg.model.max_length:
            raise ValueError(
                f"a prompt of {prompts.longest} tokens and an answer of {drawing.max_tokens}; "
                f"allowed: together at most model.max_length = {cfg.model.max_length}"
            )
        self._settings = EngineConfig(
            rows=drawing.rows,
            page_slots=_PAGE_SLOTS[longest > _SHORT],
            chunk=prompts.longest,
            longest=longest,
            steady=True,
            share_prefixes=False,
        )
        self._hand_over = jax.jit(lambda state: handed_over(cfg, graphdef, state))
        self._engine: Engine | None = None

    @property
    def statistics(self) -> Statistics:
        """What the engine has done so far, and how long it took."""
        return self._engine.statistics if self._engine else Statistics()

    def groups(
        self,
        weights: TrainState,
        chosen: Sequence[int],
        batch: int,
        told: Callable[[int, int], None] = lambda ended, all_: None,
    ) -> list[Group]:
        """Answers to the chosen prompts of a batch, whose number it is. `weights` are the whole
        model's on one device. `told` hears how many answers have ended, of how many; what it raises
        ends the drawing.
        """
        engine = self._with_weights(weights)
        requests = [
            self._request(prompt, self.drawing.seed_of(batch, place, prompt, number))
            for place, prompt in enumerate(chosen)
            for number in range(self.drawing.group)
        ]
        outputs = self._outputs(engine, requests, told)
        size = self.drawing.group
        return [
            Group(int(prompt), outputs[place * size : (place + 1) * size])
            for place, prompt in enumerate(chosen)
        ]

    def attempts(self, groups: Sequence[Group]) -> list[Attempt]:
        """What rewards look at, group by group."""
        return [self._attempt(group.prompt, output) for group in groups for output in group.outputs]

    def _with_weights(self, state: TrainState) -> Engine:
        weights = self._hand_over(state._replace(optimizer=()))
        if self._engine is None:
            self._engine = Engine(weights, self._settings)
        else:
            self._engine.take_weights(weights)
        return self._engine

    def _request(self, prompt: int, seed: int) -> Request:
        how = self.drawing
        tokens = self.prompts.tokens[prompt]
        return Request(tokens, how.max_tokens, how.temperature, how.top_p, seed, self.end_ids)

    def _outputs(
        self, engine: Engine, requests: Sequence[Request], told: Callable[[int, int], None]
    ) -> list[Output]:
        """In their order. All prompts that have room are read before any answer goes on: the rows
        go on together, whether few are read or all.
        """
        number_of = {engine.submit(request): i for i, request in enumerate(requests)}
        written: list[tuple[list[int], list[float]]] = [([], []) for _ in requests]
        ended: dict[int, bool] = {}
        try:
            while engine.pending:
                answers = engine.read_prompts()
                if not answers:
                    answers = engine.go_on()
                for answer in answers:
                    number = number_of[answer.id]
                    written[number][0].extend(answer.tokens)
                    written[number][1].extend(answer.logprobs)
                    if answer.ended:
                        ended[number] = answer.ended == "stop"
                told(len(ended), len(requests))
        finally:  # whoever is told may stop it
            for request_id in number_of:
                engine.cancel(request_id)
        return [self._output(*pair, ended[i]) for i, pair in enumerate(written)]

    def _output(self, tokens: list[int], logprobs: list[float], ended: bool) -> Output:
        stream = TextStream(self._token_bytes)
        shown = tokens[: len(tokens) - ended]
        text = "".join([*map(stream.add, shown), stream.finish()])
        return Output(tokens, logprobs, ended, text)

    def _attempt(self, prompt: int, output: Output) -> Attempt:
        asked = self.prompts.prompts[prompt]
        text, reasoning = without_reasoning(output.text)
        return Attempt(
            prompt=asked.prompt,
            text=text,
            reasoning=reasoning,
            reference=asked.reference,
            fields=asked.fields,
            cut=not output.ended,
            tokens=len(output.tokens),
            id=asked.id,
            kind=asked.kind,
        )


def handed_over(cfg: RunConfig, graphdef: nnx.GraphDef, state: TrainState) -> Weights:
    """Masters as a training step multiplies with them, laid out for decoding."""
    recipe, dtype = recipe_of(cfg.quant), jnp.dtype(cfg.train.dtype)

    def computed_with(path: tuple, master: jax.Array) -> jax.Array:
        name = parameter_name(path)
        rule = recipe.get(class_of(name))
        if rule:
            return rule.weight.quantize(master).dequantize(dtype)
        is_rounded = is_linear(name) or name.endswith(("embed_VD", "head_DV"))
        return master.astype(dtype) if is_rounded else master

    params = jax.tree_util.tree_map_with_path(computed_with, state.params)
    return lay_out(nnx.merge(graphdef, params, state.biases))
