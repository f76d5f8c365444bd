"""How many of its MTP modules' drafts a model takes, and what decoding with them gains.

    python experiments/mtp_acceptance/run.py [--folder FOLDER | --runs FOLDER FOLDER ...]

Trains the default run, the same with two MTP modules, and configs/stdlib_30min.py, as far as they
are not in the folder; or takes the newest checkpoints of other runs. Trained runs are measured in
some minutes on two CPU cores, training takes three quarters of an hour.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from curves import HERE, train
from drafts import Counts, chances, replayed, together
from kinds_of_text import KINDS, rows_of
from routing import Trained, some, trained

from dsv3_jax.cli import parse, run, to_stderr, user_errors
from dsv3_jax.config.fields import check
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out

CONFIGS = HERE.parent / "configs"
PROMPT = 64  # tokens
TEMPERATURES = (0.0, 1.0)
HELD_OUT = "held out"  # of the text that the run was trained on


@dataclass(frozen=True)
class Options:
    """Which runs are measured, and how long."""

    folder: Path = Path("runs/mtp_acceptance")
    """Of the runs"""
    runs: tuple[Path, ...] = ()
    """Folders of other runs instead, with MTP modules"""
    texts: int = 16
    """Of each kind of text and temperature"""
    tokens: int = 128
    """New ones of a text"""
    rows: tuple[int, ...] = (1, 8)
    """Texts that go on at the same time while speed is measured"""
    rounds: int = 5
    """Of the measurement of speed"""

    def __post_init__(self) -> None:
        for name in ("texts", "rounds"):
            value = getattr(self, name)
            check(f"--{name}", value, value >= 1, "1 or more")
        sound = bool(self.rows) and all(1 <= rows <= self.texts for rows in self.rows)
        check("--rows", self.rows, sound, f"1 to --texts, {self.texts}")
        # Some tokens are made while the other rows' prompts are read, up to 64 in a turn.
        least = 8 * max(self.rows) + 64
        check("--tokens", self.tokens, self.tokens >= least, f"at least {least} with such --rows")


class Speed(NamedTuple):
    """Of the same texts without drafts and with them, tokens/s of all rows, medians of rounds; and
    the median of the ratios within a round.
    """

    plain: float
    drafted: float
    ratio: float


def main(args: list[str]) -> None:
    """The command."""
    options = parse(Options, Options(), prog="run.py", description=__doc__, args=args)
    with user_errors():
        tell(options)


def tell(options: Options) -> None:
    """Trains what is missing, prints a table of acceptance and one of speed."""
    acceptance, speed = [], []
    for path in options.runs or trained_runs(options.folder):
        of = trained(path)
        check_drafts(of, path, options.tokens)
        name = f"`{path.name.rpartition('-')[0] or path.name}`, step {of.step:,}"
        engines = engines_of(of, max(options.rows))
        prompts = prompts_of(of, options.texts)
        counts = accepted(of, engines, prompts, options.tokens)
        acceptance += [acceptance_line(name, *key, found) for key, found in counts.items()]
        for temperature in TEMPERATURES:
            per_step = counts[HELD_OUT, temperature].tokens_per_step
            for rows in options.rows:
                to_stderr(f"speed: rows {rows}, temperature {temperature:g}")
                found = speeds(engines, prompts[HELD_OUT], temperature, rows, options)
                speed.append(
                    f"| {name} | {rows} | {temperature:g} | {found.plain:,.0f} "
                    f"| {found.drafted:,.0f} | {found.ratio:.2f} | {per_step:.2f} |"
                )
    print_table(("run", "text", "temperature", "drafts taken", "tokens a step"), acceptance)
    print()
    heads = "run", "rows", "temperature", "tokens/s without drafts", "with", "times"
    print_table((*heads, "tokens a step"), speed)


def trained_runs(folder: Path) -> list[Path]:
    """Of the experiment itself."""
    tiny = CONFIGS / "tiny.py"
    return [
        train(folder, "tiny", config=tiny),
        train(folder, "two_modules", "--model.mtp-depth", "2", config=tiny),
        train(folder, "stdlib_30min", config=CONFIGS / "stdlib_30min.py"),
    ]


def check_drafts(of: Trained, path: Path, tokens: int) -> None:
    """ValueError for a run that makes none, or has no room for such texts."""
    model = of.cfg.model
    if not model.mtp_depth:
        raise ValueError(f"{path}: model.mtp_depth is 0; allowed: runs with MTP modules")
    room = model.max_length - PROMPT
    check("--tokens", tokens, tokens <= room, f"at most {room}, the longest of {path}")


# --- texts ---------------------------------------------------------------------------------------


def prompts_of(of: Trained, count: int) -> dict[str, np.ndarray]:
    """By kind of text the beginnings of rows that the run has never seen, int32 [count, PROMPT]."""
    rows = {HELD_OUT: of.held_out} | {kind: rows_of(KINDS[kind], of) for kind in KINDS}
    return {
        kind: np.stack([row.tokens_T[:PROMPT] for row in some(of_kind, count)])
        for kind, of_kind in rows.items()
    }


def engines_of(of: Trained, rows: int) -> list[Engine]:
    """With 0, 1 ... drafts, up to all that the model has."""
    settings = EngineConfig(rows=rows, share_prefixes=False)  # each round reads all prompts
    return [
        Engine(lay_out(of.model, drafts=drafts), replace(settings, drafts=drafts))
        for drafts in range(of.cfg.model.mtp_depth + 1)
    ]


def requests_of(prompt_BT: np.ndarray, tokens: int, temperature: float) -> list[Request]:
    """No token ends a text, so that all have one length."""
    return [
        Request(prompt_T.tolist(), tokens, temperature, seed=seed)
        for seed, prompt_T in enumerate(prompt_BT)
    ]


def written(engine: Engine, requests: Sequence[Request]) -> np.ndarray:
    """Prompts and what the engine adds to them, int32 [B, T]."""
    texts = {engine.submit(request): list(request.prompt) for request in requests}
    for answer in engine.run():
        texts[answer.id] += answer.tokens
    return np.array(list(texts.values()), np.int32)


# --- acceptance ----------------------------------------------------------------------------------


def accepted(
    of: Trained, engines: Sequence[Engine], prompts: Mapping[str, np.ndarray], tokens: int
) -> dict[tuple[str, float], Counts]:
    """With all drafts, by kind of text and temperature."""
    found = {}
    for kind, prompt_BT in prompts.items():
        to_stderr(f"texts: {kind}")
        for temperature in TEMPERATURES:
            text_BT = written(engines[-1], requests_of(prompt_BT, tokens, temperature))
            chance_BND = chances(of.model, text_BT, PROMPT, greedy=temperature == 0)
            found[kind, temperature] = replayed(chance_BND)
    for temperature in TEMPERATURES:
        found["all", temperature] = together([found[kind, temperature] for kind in prompts])
    return found


def acceptance_line(name: str, kind: str, temperature: float, found: Counts) -> str:
    """Of the table."""
    shares = ", ".join(f"{share:.1%}" for share in found.acceptance_D)
    return f"| {name} | {kind} | {temperature:g} | {shares} | {found.tokens_per_step:.2f} |"


# --- speed ---------------------------------------------------------------------------------------


def speeds(
    engines: Sequence[Engine],
    prompt_BT: np.ndarray,
    temperature: float,
    rows: int,
    options: Options,
) -> Speed:
    """The engines without drafts and with all, by turns."""
    lots = [prompt_BT[i : i + rows] for i in range(0, len(prompt_BT) - rows + 1, rows)]
    lots = [requests_of(lot, options.tokens, temperature) for lot in lots]
    pair = engines[0], engines[-1]
    for engine in pair:
        speed(engine, lots[:1])  # whatever is to be compiled
    rounds = []
    for i in range(options.rounds):
        order = pair if i % 2 else pair[::-1]
        found = {id(engine): speed(engine, lots) for engine in order}
        rounds.append([found[id(engine)] for engine in pair])
    plain, drafted = (median(column) for column in zip(*rounds, strict=True))
    return Speed(plain, drafted, median(with_ / without for without, with_ in rounds))


def speed(engine: Engine, lots: Sequence[Sequence[Request]]) -> float:
    """Tokens/s while all texts of a lot go on: in the turns after the first token of the last one
    to have one, up to the first end. The turn of that end makes steps that no text needs, and
    counts only where there is no other.
    """
    tokens, seconds = 0, 0.0
    for lot in lots:
        going = {engine.submit(request) for request in lot}
        begun: set[int] = set()
        while begun != going:
            begun |= {answer.id for answer in engine.turn()}
        turns: list[tuple[int, float]] = []
        ended = False
        while not ended:
            start = time.perf_counter()
            answers = engine.turn()
            spent = time.perf_counter() - start
            ended = any(answer.ended for answer in answers)
            if not (ended and turns):
                turns.append((sum(len(answer.tokens) for answer in answers), spent))
        tokens += sum(one for one, _ in turns)
        seconds += sum(spent for _, spent in turns)
        for request_id in going:
            engine.cancel(request_id)
    return tokens / seconds


def print_table(heads: Sequence[str], lines: Sequence[str]) -> None:
    """In Markdown."""
    print("\n".join([f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *lines]))


if __name__ == "__main__":
    run(main)
