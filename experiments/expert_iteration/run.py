"""Does a small model learn longer proofs from its own attempts, checked by a program?

    python experiments/expert_iteration/run.py [--folder FOLDER]

Teaches a model proofs, and then gives it other statements, each with its negation and without any
proof, for some rounds of expert iteration. Beside it a model that goes on with the first proofs
alone. Half an hour on two CPU cores.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from curves import HERE, train
from ground_logic import Claim, claims, text_of

from dsv3_jax.cli import parse, run, user_errors
from dsv3_jax.config.fields import check
from dsv3_jax.drawing import BLUE, GREEN, ORANGE, new_figure
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.posttrain.candidates import entry_of, seed_of
from dsv3_jax.posttrain.completions import Ask
from dsv3_jax.posttrain.iteration_statistics import NOT, pass_rates, sides_of
from dsv3_jax.posttrain.local_model import LocalModel
from dsv3_jax.posttrain.problems import read_problems
from dsv3_jax.posttrain.synthesis_options import Sampling
from dsv3_jax.posttrain.templates import TEMPLATES
from dsv3_jax.posttrain.verifiers import verifiers

CONFIG = HERE / "expert_iteration" / "config.py"
EASY, LONG, HARD = (1, 2), (3,), (2, 3)  # connectives of what is taught, shown, to be proved
SEEDS = {"taught": 0, "shown": 1, "hard": 2}
KIND = "reasoning_original"
MOST_TOKENS, ROWS = 110, 64
SAVING = ("--output.save-every", "1000", "--output.eval-every", "1000")
SAVING += ("--output.sample-tokens", "0")


def recipe(steps: int, first: float, last: float) -> tuple[str, ...]:
    """Options of sft: so many steps on a cosine between two rates."""
    rates = (
        "--schedule.learning-rate",
        f"{first:g}",
        "--schedule.final-learning-rate",
        f"{last:g}",
    )
    return ("--train.steps", f"{steps}", *rates, "--schedule.warmup-steps", "20", *SAVING)


TEACHING, SHOWING = recipe(500, 3e-3, 3e-4), recipe(300, 2e-3, 2e-4)
TUNING = recipe(100, 5e-4, 5e-5)


@dataclass(frozen=True)
class Options:
    """How much, and where the runs lie."""

    folder: Path = Path("runs/expert_iteration")
    """Of the runs"""
    taught: int = 2500
    """Statements of one and two connectives with proofs"""
    repeated: int = 1000
    """Of these, that are read again beside longer ones"""
    shown: int = 500
    """Statements of three connectives with proofs"""
    reviewed: int = 250
    """Of either, that are read again in each round"""
    attempted: int = 200
    """Others of two and three, without proofs"""
    held_out: int = 60
    """Of the same kind, that are never learned"""
    rounds: int = 4
    attempts: int = 4
    """At each statement and at its negation, in each round"""

    def __post_init__(self) -> None:
        for name in (
            "taught",
            "repeated",
            "shown",
            "reviewed",
            "attempted",
            "held_out",
            "rounds",
            "attempts",
        ):
            value = getattr(self, name)
            check(f"--{name.replace('_', '-')}", value, value >= 1, "1 or more")


def main(args: list[str]) -> None:
    """The command."""
    options = parse(Options, Options(), prog="run.py", description=__doc__, args=args)
    with user_errors():
        tell(options)


def tell(options: Options) -> None:
    """Makes what is missing, prints tables and draws pass rates by round."""
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    asked, held_out = hard(options)
    model = taught(options)
    for name, chosen in (("statements", asked), ("held_out", held_out)):
        write_lines(folder / f"{name}.jsonl", lines_of(chosen))
    out = folder / "iteration"
    iterate(options, model, out)
    rows = rows_of(out, asked, held_out)
    beside = control(options, model, held_out)
    rows.append({"model after round": "none, as many steps on the first proofs", **beside})
    print(table(rows))
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, folder / "pass_rates.png")


# --- the task ------------------------------------------------------------------------------------


def hard(options: Options) -> tuple[list[Claim], list[Claim]]:
    """Statements to attempt and statements that are held out, none of which was taught."""
    known = {one.statement for one in (*easy(options), *longer(options))}
    found = claims(6 * (options.attempted + options.held_out), HARD, SEEDS["hard"])
    asked, held_out = [], []
    for count in HARD:
        some = [f for f in found if connectives(f) == count and f.statement not in known]
        first = options.attempted // len(HARD)
        asked += some[:first]
        held_out += some[first : first + options.held_out // len(HARD)]
    return asked, held_out


def easy(options: Options) -> list[Claim]:
    """Whose proofs are taught."""
    return claims(options.taught, EASY, SEEDS["taught"])


def longer(options: Options) -> list[Claim]:
    """Whose proofs are shown."""
    return claims(options.shown, LONG, SEEDS["shown"])


def reviewed(options: Options) -> list[Claim]:
    """Whose proofs are read again in each round."""
    return [*easy(options)[: options.reviewed], *longer(options)[: options.reviewed]]


def connectives(claim: Claim) -> int:
    """Each has its brackets."""
    return text_of(claim.statement).count("(")


def lines_of(chosen: Sequence[Claim]) -> Iterable[dict[str, str]]:
    """Each statement and its negation, as the command reads them."""
    for number, claim in enumerate(chosen):
        for id_, statement in ((f"{number}", claim.statement), (f"{NOT}{number}", claim.negation)):
            text = text_of(statement)
            yield {"id": id_, "prompt": text, "reference": text}


def conversation_of(claim: Claim) -> dict[str, Any]:
    """A statement that is true and its proof, to learn from."""
    turns = ("user", text_of(claim.proved)), ("assistant", claim.proof)
    return {"messages": [{"role": role, "content": said} for role, said in turns]}


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """As JSON Lines."""
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))


# --- runs ----------------------------------------------------------------------------------------


def taught(options: Options) -> Path:
    """The folder of a model that knows easy proofs and has seen longer ones."""
    folder, known = options.folder.absolute(), easy(options)
    texts = folder / "proofs.txt"
    texts.write_text("\n\n".join(f"{text_of(one.proved)}\n{one.proof}" for one in known))
    base = train(folder, "base", "--data.source", str(texts), config=CONFIG)
    first = tune(folder, "taught", base, known, TEACHING)
    return tune(folder, "shown", first, [*known[: options.repeated], *longer(options)], SHOWING)


def tune(
    folder: Path, name: str, model: Path, proofs: Sequence[Claim], options: Sequence[str]
) -> Path:
    """The folder of a model that was fine-tuned on proofs."""
    samples, done = folder / f"{name}.jsonl", folder / f"{name}-001"
    write_lines(samples, map(conversation_of, proofs))
    if not (done / "result.json").exists():
        given = ["--init-from", model, "--data.source", samples, "--output.folder", folder]
        call("sft", *given, "--output.name", name, *options)
    return done


def iterate(options: Options, model: Path, out: Path) -> None:
    """Rounds of attempts and fine-tuning, from the model that knows proofs."""
    folder, known = out.parent, out.parent / "reviewed.jsonl"
    write_lines(known, map(conversation_of, reviewed(options)))
    words = ["--statements", folder / "statements.jsonl", "--held-out", folder / "held_out.jsonl"]
    words += [
        "--samples",
        folder / "shown.jsonl",
        "--checkpoint",
        model,
        "--out",
        out,
        "--verifier",
        "proof",
    ]
    words += ["--rounds", options.rounds, "--attempts", options.attempts, "--tune-from", "last"]
    words += ["--max-tokens", MOST_TOKENS, "--rows", ROWS, "--dtype", "float32"]
    call("expert_iteration", *words, "--", *TUNING)


def call(module: str, *words: object) -> None:
    """A command of the package. SystemExit if it ends early."""
    command = [sys.executable, "-m", f"dsv3_jax.{module}", *map(str, words)]
    print(f"== {module}", flush=True)
    ended = subprocess.run(command, cwd=HERE.parent, check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def control(options: Options, model: Path, held_out: Sequence[Claim]) -> dict[str, Any]:
    """What a model makes of the held-out statements that saw as many steps, and no new proof."""
    folder = options.folder.absolute()
    samples = reviewed(options)
    for number in range(options.rounds):
        model = tune(folder, f"control{number + 1}", model, samples, TUNING)
    problems = read_problems(folder / "held_out.jsonl", TEMPLATES, KIND, {})
    asks = [
        Ask(problem, number, seed_of(problem, number, 0))
        for problem in problems
        for number in range(options.attempts)
    ]
    engine = EngineOptions(rows=ROWS)
    source = LocalModel(model, Sampling(max_tokens=MOST_TOKENS), engine, dtype="float32")
    judges = verifiers(["proof"])
    entries = [entry_of(ask, answer, judges, {}) for ask, answer in source.answers(asks)]
    found = pass_rates(sides_of(problems), entries, options.attempts)["pass"]
    return {"held out": found, "held out by connectives": by_connectives(entries, held_out)}


# --- what is shown -------------------------------------------------------------------------------

Row = dict[str, Any]
COUNTS = ("attempts", "accepted", "pass", "cumulative", "proved", "refuted", "both")
COUNTS += ("new samples", "samples")


def rows_of(out: Path, asked: Sequence[Claim], held_out: Sequence[Claim]) -> list[Row]:
    """Of each round what its model made of the statements and of those held out; the last row has
    the last model, which made no attempts but at those held out.
    """
    rounds = json.loads((out / "report.json").read_text())["rounds"]
    rows: list[Row] = []
    for number, (before, one) in enumerate(pairwise([*rounds, {}])):
        row: Row = {"model after round": number}
        if one:
            row |= {name: one[name] for name in COUNTS}
            entries = read_lines(out / f"round-{one['round']:03d}" / "candidates.jsonl")
            row["by connectives"] = by_connectives(entries, asked)
        if before.get("held out"):
            entries = read_lines(out / f"round-{number:03d}" / "held_out.jsonl")
            row["held out"] = before["held out"]["pass"]
            row["held out by connectives"] = by_connectives(entries, held_out)
        else:  # nothing was new: it is the model of the round before
            row |= {name: said for name, said in rows[-1].items() if name.startswith("held out")}
        rows.append(row)
    return rows


def by_connectives(entries: Sequence[Mapping[str, Any]], chosen: Sequence[Claim]) -> dict:
    """pass@1 of the statements with so many connectives."""
    attempts = 1 + max(entry["candidate"] for entry in entries)
    found = {}
    for count in HARD:
        sides = {
            (f"{n}", KIND): [(f"{n}", KIND), (f"{NOT}{n}", KIND)]
            for n, claim in enumerate(chosen)
            if connectives(claim) == count
        }
        known = {side for both in sides.values() for side in both}
        some = [entry for entry in entries if (entry["id"], entry["kind"]) in known]
        found[f"{count}"] = pass_rates(sides, some, attempts)["pass"]["1"]
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Of JSON Lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    most = max(rows[0]["pass"], key=int)
    counts = [f"{count} connectives" for count in HARD]
    head = ["model after round", "pass@1", *counts, f"pass@{most}", "settled so far", "samples"]
    head += ["held out: pass@1", *counts, f"pass@{most}"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [f"{row['model after round']}"]
        if "pass" in row:
            shares = [row["pass"]["1"], *row["by connectives"].values(), row["pass"][most]]
            cells += [f"{share:.1%}" for share in (*shares, row["cumulative"])]
            cells.append(f"{row['samples']:,}")
        else:
            cells += [""] * (4 + len(HARD))
        shares = [row["held out"]["1"], *row["held out by connectives"].values()]
        lines.append([*cells, *(f"{share:.1%}" for share in (*shares, row["held out"][most]))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Pass rates by the rounds that a model has learned from; crosses are the model beside it."""
    most = max(rows[0]["pass"], key=int)
    *rounds, beside = rows
    attempted = [row for row in rounds if "pass" in row]
    curves = (
        ("settled so far", GREEN, "o-", attempted, lambda row: row["cumulative"]),
        (f"pass@{most}", BLUE, "o-", attempted, lambda row: row["pass"][most]),
        ("pass@1", ORANGE, "o-", attempted, lambda row: row["pass"]["1"]),
        (f"pass@{most}, held out", BLUE, "o--", rounds, lambda row: row["held out"][most]),
        ("pass@1, held out", ORANGE, "o--", rounds, lambda row: row["held out"]["1"]),
    )
    with new_figure(7, 3.8) as figure:
        panel = figure.subplots()
        for name, colour, style, some, share in curves:
            places = [row["model after round"] for row in some]
            shares = [100 * share(row) for row in some]
            panel.plot(places, shares, style, markersize=4, color=colour, label=name)
        for k, colour in ((most, BLUE), ("1", ORANGE)):
            last = rounds[-1]["model after round"]
            panel.plot([last], [100 * beside["held out"][k]], "x", color=colour, markersize=9)
        panel.set_title("Statements of two and three connectives settled, %")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("rounds that the model has learned from")
        panel.set_ylim(-2, 102)
        panel.legend(ncols=2)
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run(main)
