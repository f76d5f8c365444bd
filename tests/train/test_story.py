"""Every sentence follows from the entries, and none is made up where they are silent."""

import math
from dataclasses import replace

import pytest

from dsv3_jax.train.expert_pictures import loads_of
from dsv3_jax.train.report import Result
from dsv3_jax.train.story import facts_of, sentences, state, tiles
from tests.logged import CFG, OLD, RESULT, event, make_entries


def told(entries: list[dict], result: Result | None = RESULT) -> dict[str, str]:
    """All sentences with their tones."""
    loads = loads_of(entries)
    last_LE = None if loads is None else loads.shares_NLE[-1]
    return dict(sentences(facts_of(CFG, entries, result), last_LE))


def test_a_complete_run_is_told_in_seven_sentences():
    said = told(make_entries())
    first = next(iter(said))
    assert first == "On held-out text the model wins: 25.0% fewer bits than zlib."
    assert said[first] == "good"
    text = " ".join(said)
    for part in (
        "Training loss went from",
        "Validation went from 1.500 to 1.062 bits per byte.",
        "MaxVio 0.04",
        "All 12 experts were in use.",
        "No trouble: no update was skipped.",
        "It waited for data 1.0% of the time.",
    ):
        assert part in text, part
    assert len(said) == 7


@pytest.mark.parametrize(
    ("names", "said", "tone"),
    [
        (["skipped"], "Trouble: 1 update skipped.", "warn"),
        (["skipped", "skipped", "rewound"], "Trouble: 2 updates skipped, rewound once.", "warn"),
        (["rewound", "rewound"], "Trouble: rewound twice.", "warn"),
        (["not saved"], "Trouble: not saved once.", "warn"),
        (["warning"], "No trouble: no update was skipped.", ""),
    ],
)
def test_only_trouble_is_called_so(names: list[str], said: str, tone: str):
    assert told([*make_entries(), *map(event, names)])[said] == tone


def test_skipped_updates_are_counted_by_the_entries_or_the_events():
    counted = [*make_entries(), {"kind": "train", "step": 400, "tokens": 1, "skipped": 3}]
    assert told(counted)["Trouble: 3 updates skipped."] == "warn"
    assert told([*counted, *[event("skipped")] * 5])["Trouble: 5 updates skipped."] == "warn"


def test_how_a_run_ended_is_said():
    assert state(facts_of(CFG, make_entries(), RESULT)) == ("Finished: all 400 steps", "good")
    half = [entry for entry in make_entries() if entry["step"] <= 200]
    assert state(facts_of(CFG, half, None)) == ("Not finished: 200 of 400 steps (50%)", "warn")
    assert state(facts_of(CFG, [], None)).text == "Not finished: 0 of 400 steps (0%)"
    lost = [*half, {"kind": "train", "step": 210, "tokens": 1, "main_loss": None}]
    said = "The loss is not finite after 210 of 400 steps"
    assert state(facts_of(CFG, lost, None)) == (said, "bad")
    diverged = replace(RESULT, bits_per_byte=math.nan, validation_loss=math.nan)
    assert state(facts_of(CFG, make_entries(), diverged)).tone == "bad"


def test_idle_experts_are_counted():
    entries = make_entries()
    last = max(i for i, entry in enumerate(entries) if entry["kind"] == "experts")
    entries[last] = entries[last] | {"load_LE": [[0, 1, 200, 199]] * 3}
    said = "6 of 12 experts had less than a tenth of the mean load at the end."
    assert told(entries)[said] == "warn"


def test_a_validation_that_rises_again_is_told():
    rising = {"kind": "validation", "step": 400, "tokens": 819_200, "bits_per_byte": 1.9}
    (said,) = (text for text, tone in told([*make_entries(), rising]).items() if tone == "warn")
    assert said.startswith("Validation went from 1.500 to 1.900 bits per byte; its best was 1.062")
    assert said.endswith(" after 819.2k tokens, before the end.")


def test_a_run_that_waits_for_data_is_warned_of():
    waiting = [entry | {"data_wait": 0.2} for entry in make_entries()]
    assert told(waiting)["It waited for data 20.0% of the time."] == "warn"


def test_what_old_entries_do_not_say_is_left_out():
    assert told(OLD, None) == {}
    labels = {tile.label for tile in tiles(facts_of(CFG, OLD, None))}
    assert labels == {"tokens", "loss"}
    labels = {tile.label for tile in tiles(facts_of(CFG, make_entries(), RESULT))}
    assert labels == {
        *("tokens", "time", "tokens per second", "loss", "MaxVio", "peak memory"),
        "skipped updates",
    }
