"""The report: every number of every round, whatever names hold."""

import json
from pathlib import Path

from dsv3_jax.posttrain.iteration_report import draw_rates, markdown, write_report

HELD_OUT = {"statements": 2, "attempts": 4, "accepted": 1, "pass": {"1": 0.25, "2": 0.5}}


def record(number: int, **changes) -> dict:
    return {
        "round": number,
        "model": {"model": "a|b", "step": 1200},
        "statements": 1234,
        "attempts": 4936,
        "accepted": 77,
        "share": 77 / 4936,
        "pass": {"1": 0.125, "2": 0.25},
        "proved": 30,
        "refuted": 4,
        "both": 0,
        "cumulative": 0.5,
        "fates": {"rejected": 4859, "kept": 77},
        "new samples": 77,
        "samples": 1077,
        "tuned": True,
        **changes,
    }


def test_the_tables_hold_what_was_counted(tmp_path: Path):
    rounds = [{"round": 0, "held out": HELD_OUT}, record(1, **{"held out": HELD_OUT})]
    rounds.append(record(2, model=None, tuned=False, fates={"kept": 77, "duplicate": 3}))
    text = markdown(rounds, {"--verifier": ["regex:a|b"]}, 3)
    for row in (
        "| 1 | a\\|b, step 1,200 | 1,234 | 4,936 | 77 | 1.6 % | 12.5 % | 25.0 % | 50.0 % |",
        " | 50.0 % | 30 | 4 | 0 |",
        "| 2 | none | 1,234 |",
        "| round | rejected | kept | duplicate | new samples | samples | fine-tuned |",
        "| 1 | 4,859 | 77 | 0 | 77 | 1,077 | yes |",
        "| 2 | 0 | 77 | 3 | 77 | 1,077 | no |",
        "| after round | statements | attempts | accepted | pass@1 | pass@2 |",
        "| 0 | 2 | 4 | 1 | 25.0 % | 50.0 % |",
        '| --verifier | ["regex:a\\|b"] |',
        "3 statements are contaminated and were not asked.",
    ):
        assert row in text
    assert "Held-out" not in markdown([{"round": 0, "held out": None}, record(1)], {}, 0)
    write_report(tmp_path, rounds, {"--seed": 0}, 3)
    assert json.loads((tmp_path / "report.json").read_text())["rounds"] == rounds
    assert (tmp_path / "pass_rates.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_no_held_out_statements(tmp_path: Path):
    draw_rates([{"round": 0, "held out": None}, record(1)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 150_000
