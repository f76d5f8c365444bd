"""Pictures take their colours from the page, and are absent where nothing was logged."""

import math
import re

import pytest

from dsv3_jax.drawing import SERIES
from dsv3_jax.train import page_pictures
from dsv3_jax.train.page_pictures import Curve, Frame, draw, frame_of
from tests.logged import CFG, GROUPS, OLD, event, make_entries


def test_without_a_finite_value_there_is_no_picture():
    curve = Curve("a", SERIES[0], [1.0, 2.0], [math.nan, math.nan])
    assert draw("Nothing", [curve], Frame(2.0)) is None
    assert draw("Nothing", [], Frame(2.0)) is None
    assert page_pictures.losses([]) is None
    assert page_pictures.bits(OLD[:1], 2.0) is None
    assert page_pictures.gradients(OLD, 1.0) is None
    assert page_pictures.memory(OLD) is None
    assert page_pictures.single(OLD, "data_wait", "Waiting") is None


def test_colours_are_the_pages_and_text_stays_text():
    picture = page_pictures.losses(make_entries())
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", picture.svg)
    assert {"var(--c1)", "var(--c2)", "var(--ink)"} <= set(re.findall(r"var\(--\w+\)", picture.svg))
    assert re.search(r"<text[^>]*>200k</text>", picture.svg)
    assert picture.svg.startswith('<svg role="img" aria-label="Loss, nats per token"')
    assert dict(picture.legend)["training"] == "var(--c1)"


def test_a_loss_that_is_switched_off_is_not_drawn():
    labels = [label for label, _ in page_pictures.losses(OLD).legend]
    assert labels == ["training", "validation"]


def test_gradients_are_drawn_by_group_beside_the_whole():
    labels = [label for label, _ in page_pictures.gradients(make_entries(), 1.0).legend]
    assert labels == [*GROUPS, "all", "clipped at 1"]
    bare = [{"kind": "train", "step": 1, "tokens": 5, "grad_norm": 2.0}]
    labels = [label for label, _ in page_pictures.gradients(bare, 0.5).legend]
    assert labels == ["all", "clipped at 0.5"]


def test_schedules_are_drawn_as_planned_and_as_logged():
    pictures = page_pictures.schedules(make_entries(), CFG)
    titles = ["Learning rate", "Rows of a step", "Bias speed γ", "MTP weight λ"]
    assert [picture.title for picture in pictures] == titles
    assert all([label for label, _ in p.legend] == ["so far", "planned"] for p in pictures)
    (rows,) = (p for p in page_pictures.schedules(OLD, CFG) if p.title == "Rows of a step")
    assert [label for label, _ in rows.legend] == ["planned"]


@pytest.mark.parametrize(("name", "marked"), [("skipped", 1), ("rewound", 1), ("warning", 0)])
def test_trouble_is_marked_where_it_happened(name: str, marked: int):
    frame = frame_of([*make_entries(), event(name)])
    assert frame.trouble == (409_600,) * marked
    assert frame.last_token == 819_200


def test_marks_of_a_run_full_of_trouble_stay_few():
    many = [event("skipped") | {"tokens": place} for place in range(5000)]
    assert 100 <= len(frame_of(many).trouble) <= 200
