"""An engine's sizes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.fields import check, check_types

if TYPE_CHECKING:
    from dsv3_jax.inference.requests import Request


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; those of rows and pages are one device's."""

    rows: int = 16
    """Texts that go on at the same time"""
    page_slots: int = 64
    """Tokens of a page"""
    pages: int | None = None
    """Of the cache; default: as many as the longest texts in all rows need"""
    chunk: int = 256
    """Most tokens of a prompt that are read between two steps"""
    drafts: int = 0
    """Tokens that MTP modules draft for each step; at most model.mtp_depth"""
    fp8_cache: bool = False
    """Keep c_kv in E4M3 with a scale for each 128: 0.57 of the bytes at V3's sizes"""
    share_prefixes: bool = True
    """Texts that begin alike share the pages of their beginning"""
    prompt_microbatches: int = 1
    """2: chunks of two prompts pass in one program, so that one's exchange between devices can hide
    behind the other's attention (report 3.4.1)"""
    bucket_factor: float = 2.5
    """Room of the exchange between devices, in shares under even routing; what finds none goes in
    further rounds"""
    shared_as_routed: bool = False
    """The shared expert is a routed one, and each token uses one more of these (3.4.2)"""
    replicas: int = 0
    """Redundant experts of a layer on all devices together (3.4.1)"""
    placement: Literal["global", "hierarchical"] = "global"
    """Copies of experts anywhere, for decoding; or on their group's node, for prompts (3.4)"""
    rebalance_seconds: float = 600.0
    """Time after which experts with copies are placed anew by the loads that were seen"""
    top_logprobs: int = 0
    """So many likeliest tokens are told of with each token"""
    prompt_logprobs: bool = False
    """Requests may wish to be told of their prompts' tokens"""
    longest: int | None = None
    """Tokens of the longest text, prompt and answer; default: model.max_length"""
    steady: bool = False
    """Neither neighbours nor the clock decide what is computed for a text: every program has one
    size, a prompt is read as one chunk that holds it, and nothing is shared or given up"""

    def __post_init__(self) -> None:
        check_types("engine", self)
        for name in ("rows", "page_slots", "chunk"):
            check(f"engine.{name}", getattr(self, name), getattr(self, name) >= 1, "at least 1")
        if self.pages is not None:
            check("engine.pages", self.pages, self.pages >= 1, "at least 1")
        for name in ("drafts", "replicas"):
            check(f"engine.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("engine.top_logprobs", self.top_logprobs, 0 <= self.top_logprobs <= 20, "0 to 20")
        microbatches = self.prompt_microbatches
        check("engine.prompt_microbatches", microbatches, microbatches in (1, 2), "1 or 2")
        factor = self.bucket_factor
        check("engine.bucket_factor", factor, 0 < factor <= 1024, "above 0, up to 1024")
        seconds = self.rebalance_seconds
        check("engine.rebalance_seconds", seconds, seconds > 0, "above 0")
        longest = self.longest
        check("engine.longest", longest, longest is None or longest >= 2, "at least 2")
        if self.steady:
            for name, needed in (("share_prefixes", False), ("pages", None), ("replicas", 0)):
                found = getattr(self, name)
                check(f"engine.{name}", found, found == needed, f"{needed} with engine.steady")

    def check_model(self, model: ModelConfig) -> None:
        """ValueError for what the model has not."""
        if self.drafts > model.mtp_depth:
            raise ValueError(
                f"engine.drafts is {self.drafts}; allowed: 0 to {model.mtp_depth}, the MTP modules "
                "of the model"
            )
        most = min(20, model.vocab_size)
        check("engine.top_logprobs", self.top_logprobs, self.top_logprobs <= most, f"0 to {most}")

    def check_request(self, request: "Request", limit: int, room: int) -> None:
        """ValueError for what an engine with room for so many tokens of a text is not set to;
        `limit` are the text's.
        """
        if request.prompt_logprobs and not self.prompt_logprobs:
            raise ValueError("prompt_logprobs; allowed where the engine's prompt_logprobs is set")
        if self.steady and len(request.prompt) > self.chunk:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens; allowed with engine.steady: at most "
                f"engine.chunk = {self.chunk}"
            )
        if limit > room:
            raise ValueError(
                f"a text of {limit} tokens, prompt and answer; allowed: at most the {room} that "
                "the cache has room for"
            )

    def num_pages(self, longest: int) -> int:
        """Of a device's pools, for texts of at most so many tokens."""
        return self.pages or self.rows * -(-longest // self.page_slots)

    def buckets(self, most: int, least: int = 1) -> tuple[int, ...]:
        """Sizes that programs are compiled for."""
        return (most,) if self.steady else buckets(most, least)


def buckets(most: int, least: int = 1) -> tuple[int, ...]:
    """Sizes that programs are compiled for: from `least` by factors of 4, and `most` itself."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 4
    return (*sizes, most)


def bucket(size: int, sizes: tuple[int, ...]) -> int:
    """The least one with room."""
    return next(one for one in sizes if one >= size)
