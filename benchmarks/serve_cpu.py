"""Servers under load on a CPU, side by side: ours, and transformers' own.

    python benchmarks/serve_cpu.py [--torch-python PATH] [--python PATH ...] [--run FOLDER]

Completions over loopback, streamed, greedy, in float32: prompts of 16 to 256 tokens that ask for 16
to 128 more, of the shape `bench_cpu` with random weights (--run: a trained run's), pieces of this
project's source. Both servers open one and the same Hugging Face folder. Loads: an open loop, in
which requests come at random at a rate, whoever is still served, and their times count from when
they were due; and a closed one, of clients that ask again when they have their answer. Every round
has other requests, the same for all contenders; all servers stay up and are asked by turns, and the
asking is done by a process beside each, whose share of a core is printed.

transformers' is `transformers serve` where its requirements are (`pip install
'transformers[serving]'`), of its variants the fastest with one client; it goes on with one request
at a time. Without them, or with --rival generate, it is a loop over `generate` without HTTP that
does the same.

Expected: a rate that transformers can bear is borne by all; above it its requests wait for each
other, and ours do not. Half an hour on two cores.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from contenders.contest_options import tell_figures
from contenders.load_table import load_table
from contenders.serving import RequestOptions, forms_of_experts
from contenders.side_by_side import (
    Contender,
    check_interpreters,
    environment,
    started,
    take_turns,
    tell,
)

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.fields import check
from dsv3_jax.config.presets import bench_cpu
from dsv3_jax.process import SWITCH

QUALIFYING = {"loads": [{"clients": 1}], "requests": 4}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class Options(RequestOptions):
    """What the loads are."""

    rounds: int = 5
    """Alternating rounds"""
    warm_up: int = 1
    """Times that a server meets as many requests as it has rows, and one alone, before the first
    round"""
    requests: int = 32
    """Of each load in a round"""
    request_tokens: tuple[int, int] = (16, 128)
    """Tokens that are asked for, fewest and most"""
    serving_rows: int = 8
    """Of the engine"""
    rates: tuple[float, ...] = (0.5, 2.0)
    """Requests a second, an open loop each"""
    clients: tuple[int, ...] = (1, 8)
    """A closed loop each"""
    rival: Literal["server", "generate"] = "server"
    """transformers' own server, or a loop over `generate`"""
    seed: int = 0
    """Of requests and of when they come"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("--requests", self.requests, self.requests >= 1, "at least 1")
        check("--rates", self.rates, all(rate > 0 for rate in self.rates), "above 0")
        check("--clients", self.clients, all(count >= 1 for count in self.clients), "at least 1")
        check("--rates, --clients", "none", self.loads, "one of them at least")

    @property
    def loads(self) -> list[dict[str, float]]:
        """Open loops before closed ones."""
        rates = [{"rate": rate} for rate in self.rates]
        return [*rates, *({"clients": count} for count in self.clients)]


@dataclass(frozen=True)
class Work:
    """What was written for the servers."""

    model: ModelConfig
    folder: Path
    text: Path


def main(args: Sequence[str]) -> None:
    """Prints one table."""
    options = parse(Options, Options(), prog="serve_cpu.py", description=__doc__, args=args)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with user_errors():
            check_interpreters(options.interpreters)
            work = written(options, folder)
        rival, qualified = fastest(options, work) if options.torch_python else ([], [])
        running = stack.enter_context(started([*ours(options, work), *rival]))
        take_turns(running, options.rounds)
        ran = [contender for contender in running if contender.loads]
    report(options, ran, qualified)


def written(options: Options, folder: Path) -> Work:
    """ValueError or OSError, one line, for a run that cannot be read."""
    model = options.served(bench_cpu())
    from contenders.served_folder import write_folder, write_text  # JAX comes in here

    tell("writing the folder that is served")
    work = Work(model, folder / "model", folder / "text.json")
    write_folder(work.folder, model, options.run)
    write_text(work.folder, work.text)
    return work


# --- contenders ---


def ours(options: Options, work: Work) -> list[Contender]:
    """This project's server under each interpreter."""
    own = ["--rows", str(options.serving_rows), "--dtype", "float32", "--port", "0"]
    return [
        over_http(
            options,
            work,
            "dsv3_jax",
            [python, "-m", "dsv3_jax.serve", "--checkpoint", str(work.folder), *own],
            ["jax"],
        )
        for python in (sys.executable, *options.python)
    ]


def rivals(options: Options, work: Work) -> list[Contender]:
    """transformers' variants: of its server, or of the loop."""
    forms = forms_of_experts(work.model, options.request_prompt[1], "transformers")
    if options.rival == "generate" or not can_serve(options.torch_python):
        return [
            by_generate(options, work, attention, form)
            for attention in ("eager", "sdpa")
            for form in forms
        ]
    folders = {form: with_experts(work.folder, form) for form in forms}
    program = [options.torch_python, "-m", "transformers.cli.transformers", "serve"]
    place = ["--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--attn-implementation"]
    return [
        over_http(
            options,
            work,
            f"transformers serve, {attention}, experts {form}",
            [*program, str(folder), *place, attention],
            ["transformers", "torch"],
        )
        for attention in ("eager", "sdpa")
        for form, folder in folders.items()
    ]


def with_experts(folder: Path, form: str) -> Path:
    """The same folder for transformers, whose server takes the form of experts from nowhere but
    config.json.
    """
    made = folder.with_name(form)
    made.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (made / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"experts_implementation": form}
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return made


def can_serve(python: str) -> bool:
    """Whether an interpreter has what `transformers serve` needs."""
    code = (
        "import sys; from transformers.utils.import_utils import is_serve_available; "
        "sys.exit(not is_serve_available())"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    if not found:
        tell("transformers serve lacks its requirements: generate instead")
    return found


def over_http(
    options: Options, work: Work, name: str, command: Sequence[str], packages: Sequence[str]
) -> Contender:
    """A server, and what asks it."""
    more = {"command": command, "packages": packages}
    return _contender(options, work, name, sys.executable, "serve_http.py", more)


def by_generate(options: Options, work: Work, attention: str, form: str) -> Contender:
    """The loop over `generate`, of random weights whatever is served otherwise."""
    config = work.model.to_hf() | {"torch_dtype": "float32"}
    return _contender(
        options,
        work,
        f"transformers generate, {attention}, experts {form}",
        options.torch_python,
        "serve_singly.py",
        {"config": config, "attention": attention, "experts": form},
    )


def _contender(
    options: Options, work: Work, name: str, python: str, script: str, more: dict[str, Any]
) -> Contender:
    asked = {
        "requests": options.requests,
        "prompt": options.request_prompt,
        "tokens": options.request_tokens,
        "seed": options.seed,
        "text": str(work.text),
        "loads": options.loads,
    }
    own = {} if options.allocator == "tuned" else {SWITCH: "default"}
    return Contender(
        name=name,
        group="serving",
        python=python,
        script=script,
        options={**asked, "rows": options.serving_rows, "warm_up": options.warm_up, **more},
        tokens=0,  # others in every turn, which tells them
        environment={**environment(options.allocator), **own, **OFFLINE},
    )


def fastest(options: Options, work: Work) -> tuple[list[Contender], list[str]]:
    """Of transformers' variants that with the shortest turns of one client, not started, none if
    none runs; and how long those of all were.
    """
    variants = rivals(options, work)
    short = [
        replace(one, options=one.options | QUALIFYING, seconds=[], loads=[]) for one in variants
    ]
    with started(short) as running:
        found = take_turns(running, options.qualify)
    if not found:
        return [], []
    seconds = {one.name: statistics.median(one.seconds) for one in found}
    best = next(one for one in variants if one.name == min(seconds, key=seconds.__getitem__))
    best.is_baseline = True
    count = QUALIFYING["requests"]
    lines = [f"{name}: {each:.1f} s for {count} requests" for name, each in seconds.items()]
    return [best], ["in the qualifying rounds, one client:", *lines]


def report(options: Options, ran: Sequence[Contender], qualified: Sequence[str]) -> None:
    """Prints the table, and keeps the figures if asked to."""
    asked, prompts = (
        f"{fewest} to {most}" for fewest, most in (options.request_tokens, options.request_prompt)
    )
    sizes = f"float32, {options.requests} requests of {asked} tokens after prompts of {prompts}"
    sizes += f", {options.serving_rows} rows; rounds: {options.rounds}"
    tell_figures(options, ran, sizes, [*load_table(ran, options.loads), *qualified])


if __name__ == "__main__":
    run(main)
