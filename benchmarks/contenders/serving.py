"""Contests of serving: requests of different lengths through the engine, and in static batches."""

import dataclasses
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contenders.arrivals import arrivals
from contenders.contest_options import ContestOptions
from contenders.side_by_side import ROOT, Contender, environment, tell

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.fields import check
from dsv3_jax.config.load import load_json
from dsv3_jax.config.presets import bench_cpu

BATCHES = "static batches"
MOST_GATHERED = 2e9  # bytes of weights that transformers' batched_mm may gather
# What prompts are pieces of for a trained model, which has not seen it; ids go on a command line,
# of which an argument may have 128 kB.
SOURCES, MOST_IDS = "dsv3_jax/inference/*.py", 10_000


@dataclass(frozen=True)
class RequestOptions(ContestOptions):
    """What is asked for, and of which model."""

    requests: int = 32
    """Of each contest of serving; 0: none"""
    request_prompt: tuple[int, int] = (16, 256)
    """Tokens of a request's prompt, fewest and most"""
    request_tokens: tuple[int, int] = (16, 256)
    """Tokens that are asked for, fewest and most"""
    serving_rows: int = 8
    """Of the engine, and of a static batch"""
    run: Path | None = None
    """Folder of a run whose model serves, instead of random weights"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("--requests", self.requests, self.requests >= 0, "0 or more")
        for name in ("request_prompt", "request_tokens"):
            fewest, most = getattr(self, name)
            shown = f"--{name.replace('_', '-')}"
            check(shown, (fewest, most), 1 <= fewest <= most, "1 or more, then as many or more")
        check("--serving-rows", self.serving_rows, self.serving_rows >= 1, "at least 1")

    def served(self, random: ModelConfig) -> ModelConfig:
        """The run's model, or `random` if there is none. ValueError for a folder that is no run,
        and for texts too long for the model.
        """
        if self.run is None:
            model = random
        elif (self.run / "config.json").exists():
            model = load_json(self.run / "config.json").model
        else:
            raise ValueError(f"--run {self.run} is no run; allowed: the folder of a trained one")
        text, longest = self.request_prompt[1] + self.request_tokens[1], model.max_length
        check(
            "a request's text", text, text <= longest, f"at most {longest} tokens, prompt included"
        )
        return model


@dataclass(frozen=True)
class ServingOptions(RequestOptions):
    """How the engine and static batches serve."""

    rates: tuple[float, ...] = (0.0, 2.0)
    """Requests a second, a contest each; 0: all come at once"""
    drafts: int = 1
    """Of the engine with drafts; that many MTP modules, random or the run's"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("--rates", self.rates, all(rate >= 0 for rate in self.rates), "0 or more")
        check("--drafts", self.drafts, self.drafts >= 1, "at least 1")


@dataclass(frozen=True)
class Served:
    """The model that serves: its shape, with MTP modules; the folder that its weights are from, and
    token ids of which prompts are pieces, or neither.
    """

    model: ModelConfig
    run: str = ""
    text: tuple[int, ...] = ()


def served_model(options: ServingOptions) -> Served:
    """ValueError for a run that makes fewer drafts, and as of `options.served`."""
    model = options.served(replace(bench_cpu(), mtp_depth=options.drafts))
    depth = model.mtp_depth
    check("--drafts", options.drafts, options.drafts <= depth, f"at most {depth}, as of --run")
    if options.run is None:
        return Served(model)
    text = own_source(options.run / "tokenizer.json")
    return Served(model, str(options.run.absolute()), tuple(text))


def own_source(tokenizer: Path) -> list[int]:
    """Token ids of some of this project's source."""
    from dsv3_jax.data.tokenizer import load_tokenizer

    files = sorted(ROOT.glob(SOURCES))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return load_tokenizer(tokenizer).encode(text).tolist()[:MOST_IDS]


def engines(options: ServingOptions, served: Served, rate: float) -> list[Contender]:
    """The engine without drafts and with them, under each interpreter."""
    return [
        _server(
            options,
            served,
            rate,
            f"dsv3_jax engine, drafts {drafts}",
            python,
            "serve_dsv3.py",
            {**_weights(served), "engine": True, "drafts": drafts},
        )
        for drafts in (0, options.drafts)
        for python in (sys.executable, *options.python)
    ]


def batching(options: ServingOptions, served: Served, rate: float) -> list[Contender]:
    """Static batches of `continued`, under each interpreter."""
    return [
        _server(
            options,
            served,
            rate,
            f"{BATCHES} of dsv3_jax",
            python,
            "serve_dsv3.py",
            {**_weights(served), "engine": False},
        )
        for python in (sys.executable, *options.python)
    ]


def generating(options: ServingOptions, served: Served, rate: float) -> list[Contender]:
    """transformers' variants, in static batches."""
    tokens = options.serving_rows * options.request_prompt[1]
    config = served.model.to_hf() | {"torch_dtype": "float32"}
    return [
        _server(
            options,
            served,
            rate,
            f"transformers {attention}, experts {form}",
            options.torch_python,
            "serve_transformers.py",
            {"config": config, "attention": attention, "experts": form},
        )
        for attention in ("eager", "sdpa")
        for form in forms_of_experts(served.model, tokens, _group(options, rate))
    ]


def _weights(served: Served) -> dict[str, Any]:
    """As dsv3_model.py takes them."""
    return {"model": dataclasses.asdict(served.model), "run": served.run}


def _group(options: ServingOptions, rate: float) -> str:
    return f"{options.requests} requests, {f'{rate:g} a second' if rate else 'at once'}"


def _server(
    options: ServingOptions,
    served: Served,
    rate: float,
    name: str,
    python: str,
    script: str,
    more: dict[str, Any],
) -> Contender:
    work = {
        "requests": options.requests,
        "rate": rate,
        "prompt": options.request_prompt,
        "tokens": options.request_tokens,
        "vocab_size": served.model.vocab_size,
        "text": served.text,
    }
    return Contender(
        name=name,
        group=_group(options, rate),
        python=python,
        script=script,
        options={**work, "rows": options.serving_rows, "warm_up": options.warm_up, **more},
        tokens=sum(arrival.tokens for arrival in arrivals(work)),
        environment=environment(options.allocator),
    )


def forms_of_experts(model: ModelConfig, tokens: int, group: str) -> list[str]:
    """Of transformers, those that a pass over so many tokens leaves room for."""
    if gathered_bytes(model, tokens) <= MOST_GATHERED:
        return ["eager", "grouped_mm", "batched_mm"]
    tell(f"{group}: without experts batched_mm, whose gathered weights take too much")
    return ["eager", "grouped_mm"]


def gathered_bytes(model: ModelConfig, tokens: int) -> int:
    """Of float32 weights of gate, up and down, one of each for every copy of a token."""
    return tokens * model.experts_per_token * 3 * model.d_model * model.expert_hidden * 4
