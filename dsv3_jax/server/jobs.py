"""What is to be written for one client: the engine's requests, and how each text is told."""

import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, NoReturn

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.requests import Request
from dsv3_jax.server.choices import Choice
from dsv3_jax.server.errors import Refusal
from dsv3_jax.server.forms import ChatForm, CompletionForm, Form
from dsv3_jax.server.protocol import ChatRequest, CompletionRequest, Sampled

_DEFAULT_TOKENS = 16  # OpenAI's, of a completion; a chat's answer may fill the context
_SEEDS = 2**32


class Job(NamedTuple):
    """As many requests as choices, of `prompt_tokens` in all prompts together."""

    requests: list[Request]
    choices: list[Choice]
    form: Form
    prompt_tokens: int
    streams: bool


class Way(NamedTuple):
    """How the choices of a request are told."""

    top: int | None
    echo: bool = False
    nothing_new: bool = False


@dataclass(frozen=True)
class Jobs:
    """Of one model."""

    name: str
    """What clients call the model"""
    tokenizer: Tokenizer
    template: ChatTemplate
    bos_id: int
    end_ids: frozenset[int]
    room: int
    """Tokens of the longest text, prompt and answer"""
    most_prompt: int
    """Tokens of a prompt, below `room`"""

    @cached_property
    def _most_bytes(self) -> int:
        """A longer prompt has too many tokens, whatever it says: it need not be read for that."""
        return self.most_prompt * max(map(len, self.tokenizer.token_bytes))

    def of_completion(self, asked: CompletionRequest) -> Job:
        """Refusal for what the model cannot do."""
        self.check_model(asked.model)
        prompts = [self._ids(prompt) for prompt in asked.prompts]
        most = _DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
        way = Way(asked.top, bool(asked.echo), most == 0)
        return self._job(asked, prompts, max(most, 1), way, CompletionForm, "prompt")

    def of_chat(self, asked: ChatRequest) -> Job:
        """Refusal for what the model or its template cannot do."""
        self.check_model(asked.model)
        contents = [message.plain() for message in asked.messages]
        self._check_size("".join(one["content"] for one in contents), "messages")
        try:
            prompt = self.template.encode(contents)
        except ValueError as error:
            raise Refusal(400, str(error), "messages") from None
        if not prompt:
            raise Refusal(400, f"{self.template.name} makes nothing of these messages", "messages")
        most = asked.max_completion_tokens or asked.max_tokens or self.room
        return self._job(asked, [prompt], most, Way(asked.top), ChatForm, "messages")

    def check_model(self, name: str | None) -> None:
        """Refusal for the name of another model; None is this one."""
        if name is not None and name != self.name:
            raise Refusal(404, f"no such model; allowed: {self.name}", "model", "model_not_found")

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_size(prompt, "prompt")
            return [self.bos_id, *self.tokenizer.encode(prompt).tolist()]
        return prompt

    def _check_size(self, text: str, param: str) -> None:
        if len(text) > self._most_bytes:
            self._refuse(f"the prompt has {len(text)} characters", param)

    def _refuse(self, found: str, param: str) -> NoReturn:
        said = f"{found}; allowed: at most {self.most_prompt} tokens"
        raise Refusal(400, said, param, "context_length_exceeded")

    def _job(
        self,
        asked: Sampled,
        prompts: list[list[int]],
        most: int,
        way: Way,
        form: type[Form],
        param: str,
    ) -> Job:
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        end_ids = frozenset() if asked.ignore_eos else self.end_ids
        requests, choices = [], []
        for prompt in prompts:
            if len(prompt) > self.most_prompt:
                self._refuse(f"the prompt has {len(prompt)} tokens", param)
            for _ in range(asked.n or 1):
                request = Request(
                    prompt,
                    min(most, self.room - len(prompt)),
                    1.0 if asked.temperature is None else asked.temperature,
                    1.0 if asked.top_p is None else asked.top_p,
                    (seed + len(requests)) % _SEEDS,
                    end_ids,
                    prompt_logprobs=way.echo and way.top is not None,
                )
                requests.append(request)
                choices.append(Choice(self.tokenizer, prompt, stops=asked.stops, **way._asdict()))
        told = form(self.name, way.top is not None, asked.tells_usage)
        return Job(requests, choices, told, sum(map(len, prompts)), bool(asked.stream))
