"""What an expert iteration has come to, round by round: Markdown, JSON and a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.drawing import BLUE, GREEN, ORANGE, SLATE, new_figure, save_picture
from dsv3_jax.files import replace_file
from dsv3_jax.posttrain.iteration_folder import NUMBERS, PICTURE, REPORT
from dsv3_jax.posttrain.markdown_tables import cell, table

Record = Mapping[str, Any]


def write_report(
    folder: Path, rounds: Sequence[Record], settings: Mapping[str, Any], skipped: int
) -> None:
    """report.json, report.md and pass_rates.png; `skipped` statements were contaminated and not
    asked. OSError where they cannot be written.
    """
    numbers = {"rounds": list(rounds), "contaminated": skipped, "settings": dict(settings)}
    replace_file(folder / NUMBERS, (json.dumps(numbers, indent=2) + "\n").encode())
    draw_rates(rounds, folder / PICTURE)
    replace_file(folder / REPORT, markdown(rounds, settings, skipped).encode())


_MEANT = """\
Rates are of the statements that a round asks: pass@k is the chance that k attempts settle one. \
Settled so far is of all statements. A round's attempts are by the model of the round before."""


def markdown(rounds: Sequence[Record], settings: Mapping[str, Any], skipped: int) -> str:
    """The report as text."""
    parts = ["# Expert iteration", f"![Pass rates and data set by round]({PICTURE})"]
    parts += ["## Attempts", _MEANT, table(*_attempt_rows(rounds))]
    if skipped:
        parts.append(f"{skipped:,} statements are contaminated and were not asked.")
    parts += ["## Data set", table(*_sample_rows(rounds))]
    held_out = list(_held_out_rows(rounds))
    if held_out:
        parts += ["## Held-out statements", "By the model that each round made."]
        parts.append(table(*held_out))
    rows = [(name, cell(json.dumps(said, ensure_ascii=False))) for name, said in settings.items()]
    return "\n\n".join([*parts, "## Settings", table(("", ""), *rows)]) + "\n"


def _ks(records: Sequence[Record]) -> list[str]:
    return list(records[0]["pass"])


def _attempt_rows(rounds: Sequence[Record]) -> Iterator[Sequence[str]]:
    ks = _ks(rounds[1:])
    rates = [f"pass@{k}" for k in ks]
    yield (
        "round",
        "model",
        "statements",
        "attempts",
        "accepted",
        "share",
        *rates,
        "settled so far",
        "proved",
        "refuted",
        "both",
    )
    for one in rounds[1:]:
        yield (
            f"{one['round']}",
            _model(one),
            *(f"{one[name]:,}" for name in ("statements", "attempts", "accepted")),
            _percent(one["share"]),
            *(_percent(one["pass"][k]) for k in ks),
            _percent(one["cumulative"]),
            *(f"{one[name]:,}" for name in ("proved", "refuted", "both")),
        )


def _model(record: Record) -> str:
    if record["model"] is None:
        return "none"
    step = record["model"]["step"]
    return cell(record["model"]["model"]) + (f", step {step:,}" if step is not None else "")


def _sample_rows(rounds: Sequence[Record]) -> Iterator[Sequence[str]]:
    fates = list(dict.fromkeys(fate for one in rounds[1:] for fate in one["fates"]))
    yield "round", *fates, "new samples", "samples", "fine-tuned"
    for one in rounds[1:]:
        counts = [
            *(one["fates"].get(fate, 0) for fate in fates),
            one["new samples"],
            one["samples"],
        ]
        yield f"{one['round']}", *(f"{n:,}" for n in counts), "yes" if one["tuned"] else "no"


def _held_out_rows(rounds: Sequence[Record]) -> Iterator[Sequence[str]]:
    measured = [one for one in rounds if one.get("held out")]
    if measured:
        ks = _ks([measured[0]["held out"]])
        yield "after round", "statements", "attempts", "accepted", *(f"pass@{k}" for k in ks)
    for one in measured:
        found = one["held out"]
        counts = (found[name] for name in ("statements", "attempts", "accepted"))
        rates = (_percent(found["pass"][k]) for k in ks)
        yield f"{one['round']}", *(f"{n:,}" for n in counts), *rates


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def draw_rates(rounds: Sequence[Record], path: Path) -> None:
    """Pass rates of the rounds and of held-out statements, above the size of the data set."""
    done = rounds[1:]
    numbers = [one["round"] for one in done]
    most = _ks(done)[-1]
    with new_figure(7, 5.4) as figure:
        rates, sizes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        lines = [
            ("settled so far", GREEN, numbers, [one["cumulative"] for one in done]),
            (f"pass@{most}", BLUE, numbers, [one["pass"][most] for one in done]),
            ("pass@1", ORANGE, numbers, [one["pass"]["1"] for one in done]),
        ]
        measured = [one for one in rounds if one.get("held out")]
        # A round's attempts are by the model of the round before.
        places = [one["round"] + 1 for one in measured]
        shares = [one["held out"]["pass"]["1"] for one in measured]
        lines += [("pass@1, held out", SLATE, places, shares)] if measured else []
        for name, colour, x, y in lines:
            style = "o--" if "held out" in name else "o-"
            rates.plot(x, [100 * share for share in y], style, color=colour, label=name)
        rates.set_title("Statements settled, %")
        rates.set_ylim(-2, 102)
        rates.legend()
        sizes.bar(numbers, [one["samples"] for one in done], color=BLUE, width=0.5)
        sizes.set_title("Samples in the data set")
        sizes.set_axisbelow(True)
        sizes.set_xlabel("round")
        sizes.xaxis.get_major_locator().set_params(integer=True)
        save_picture(figure, path, "--out")
