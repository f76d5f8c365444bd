"""What may be asked, as OpenAI names it. Every field that is not served is refused, so that nobody
gets an answer to another question; those of OpenAI's and of vLLM's that change nothing at their
defaults pass at these.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from dsv3_jax.cli import escaped
from dsv3_jax.server.errors import Refusal

MOST_CHOICES, MOST_STOPS, MOST_TOP, MOST_MESSAGES = 128, 16, 20, 4096
_SEEDS = 2**63  # OpenAI's are int64
_MESSAGE_CHARS = 300

# Every token is looked at for the beginning of each, up to its length.
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _only(value: int) -> AfterValidator:
    def checked(found: float) -> float:
        if found != value:
            raise ValueError(f"allowed here: {value}")
        return found

    return AfterValidator(checked)


Zero, One = Annotated[Number, _only(0)], Annotated[Number, _only(1)]
Nothing = Annotated[list, Field(max_length=0)]
NoNames = Annotated[dict, Field(max_length=0)]


# Pydantic looks at 4 MB of ids for 2 s, and notes 1 300 000 faults in 20 s; the loop would stand.
def _are_ids(found: list) -> bool:
    return set(map(type, found)) == {int} and min(found) >= 0 and max(found) < 2**31


def _ids_at_once(found: Any, each: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(found, list) or not found:
        return each(found)
    if not _are_ids(found):
        raise ValueError("allowed: token ids, 0 to 2^31 - 1")
    return found


def _prompts_at_once(found: Any, each: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(found, list) or not found:
        return each(found)
    if len(found) <= MOST_CHOICES and set(map(type, found)) == {str}:
        return found
    lists = found if all(type(one) is list for one in found) else [found]
    if len(lists) > MOST_CHOICES or not all(map(_are_ids, lists)):
        raise ValueError("no prompts")
    return found


Ids = Annotated[list[TokenId], WrapValidator(_ids_at_once)]


class Strict(BaseModel):
    """No field that is not named, no type that is not meant."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, found: Any) -> Any:
        """Of 300 000 unknown ones pydantic would note each, in 5 s."""
        if isinstance(found, dict) and len(found) > len(cls.model_fields):
            unknown = next(name for name in found if name not in cls.model_fields)
            raise ValueError(f"{unknown}: unknown or unserved field")
        return found


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False
    """Counts of tokens in a last piece"""
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: bool | None = None


class Sampled(Strict):
    """What both ways of asking have in common."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """Default 1"""
    top_p: Annotated[Number, Field(gt=1e-6, le=1)] | None = None
    """Default 1"""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    """Default: another one each time"""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: NoNames | None = None
    user: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    ignore_eos: bool | None = None
    """vLLM's and SGLang's, whose benchmarks want texts of a known length: no token ends one"""
    repetition_penalty: One | None = None
    top_k: Literal[-1, 0] | None = None
    min_p: Zero | None = None
    min_tokens: Literal[0] | None = None
    skip_special_tokens: Literal[True] | None = None

    @model_validator(mode="after")
    def _streams(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options; allowed with stream true")
        return self

    @property
    def texts(self) -> int:
        """How many are to be written."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings before which a text ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampled):
    """`/v1/completions`."""

    prompt: Annotated[
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_CHOICES),
        ],
        WrapValidator(_prompts_at_once),
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _all_told(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of differs from n; allowed: the same number")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0; allowed with echo alone, else 1 or more")
        return self

    @property
    def texts(self) -> int:
        """How many are to be written: for each prompt as many."""
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, each as text or as ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are told of; None: no log-probabilities at all."""
        return self.logprobs


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES, fail_fast=True)]
    name: Annotated[str, Field(max_length=1000)] | None = None
    refusal: None = None
    tool_calls: Nothing | None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing | None = None

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        named = {} if self.name is None else {"name": self.name}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | named


class TextFormat(Strict):
    """Of an answer."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """`/v1/chat/completions`."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: NoNames | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    @model_validator(mode="after")
    def _told_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs; allowed with logprobs true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens is 0; allowed: 1 or more")
        return self

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are told of; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


Kind = TypeVar("Kind", bound=Strict)
# A union's own complaint is about one of its kinds, and seldom the one that was meant.
_UNIONS = {
    "prompt": "allowed: text, a list of texts, token ids, a list of lists of ids; none empty, at "
    f"most {MOST_CHOICES}",
    "content": "allowed: text, or a list of parts of type text",
    "stop": f"allowed: text, or a list of at most {MOST_STOPS} texts, of 1 to 256 characters each",
}


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Refusal for bytes that are no such request, with the first fault that was found."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        message, param = _fault(error.errors(include_url=False, include_context=False)[0])
        raise Refusal(400, message, param) from None


def _fault(found: dict[str, Any]) -> tuple[str, str | None]:
    """What is said of it, in one line, and of which field."""
    names = [str(part) for part in found["loc"]]
    union = next((i for i, name in enumerate(names) if name in _UNIONS), None)
    message = found["msg"].removeprefix("Value error, ")
    if union is not None:
        names, message = names[: union + 1], _UNIONS[names[union]]
    elif found["type"] == "extra_forbidden":
        message = "unknown or unserved field"
    elif isinstance(found["input"], bool | int | float):
        message += f", not {found['input']}"
    where = escaped(".".join(names))[:_MESSAGE_CHARS]
    said = f"{where}: {message}" if where else message
    return escaped(said)[: 2 * _MESSAGE_CHARS], where or None
