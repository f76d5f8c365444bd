"""The picture shows every operation where and as long as it runs, and both ways apart."""

from pathlib import Path

import pytest
from matplotlib.collections import PatchCollection

from dsv3_jax.drawing import GRID, new_figure
from dsv3_jax.parallel.schedules import make, simulate
from dsv3_jax.plan.timeline import boxes_of, draw, draw_timeline, title

DUAL = simulate(make("dualpipe", 4, 8), FB=2.2)


def test_boxes_cover_each_span_and_pairs_lie_above_each_other():
    for span in DUAL.spans:
        boxes = boxes_of(span)
        assert all((box.start, box.start + box.duration) == (span.start, span.end) for box in boxes)
        assert sum(box.height for box in boxes) == pytest.approx(0.84)
        if span.operation.kind == "FB":
            upper, lower = boxes
            assert (upper.kind, upper.work) == ("F", span.operation.forward)
            assert (lower.kind, lower.work) == ("B", span.operation.backward)
            assert upper.bottom + upper.height == pytest.approx(lower.bottom)


def test_a_panel_has_a_box_and_a_number_for_each_work_and_a_bar_for_what_is_idle():
    with new_figure(12, 4) as figure:
        panel = figure.subplots()
        draw(panel, DUAL, unit="ms")
        boxes = [box for span in DUAL.spans for box in boxes_of(span)]
        collections = [c for c in panel.collections if isinstance(c, PatchCollection)]
        bars = [c for c in panel.collections if c not in collections]
        assert [len(c.get_paths()) for c in collections] == [len(boxes)]
        assert len(bars) == 4  # one a rank, of the whole step
        numbers = [text.get_text() for text in panel.texts]
        assert numbers == [str(box.work.microbatch) for box in boxes]
        assert panel.get_xlabel() == "time in ms"
        assert panel.get_xlim() == (0, DUAL.makespan)
        assert panel.get_ylim()[0] > panel.get_ylim()[1]  # the first rank on top


def test_both_ways_and_all_kinds_have_colours_of_their_own():
    with new_figure(12, 4) as figure:
        panel = figure.subplots()
        draw(panel, DUAL)
        boxes = [box for span in DUAL.spans for box in boxes_of(span)]
        (collection,) = (c for c in panel.collections if isinstance(c, PatchCollection))
        colors = map(tuple, collection.get_facecolor())
        found = {(box.kind, box.work.chunk): c for box, c in zip(boxes, colors, strict=True)}
        assert len(set(found.values())) == len(found) == 8
        labels = [text.get_text() for text in panel.get_legend().get_texts()]
        assert [label.split()[0] for label in labels] == ["F", "B", "b", "W", "light:", "idle"]
        assert panel.get_legend().legend_handles[-1].get_facecolor()[:3] == pytest.approx(
            [int(GRID[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        )


def test_numbers_that_could_not_be_read_are_left_out():
    with new_figure(4, 2) as figure:
        panel = figure.subplots()
        draw(panel, simulate(make("1f1b", 4, 100)))
        assert not panel.texts


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    draw_timeline(simulate(make("zb1p", 1, 1)), path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    with pytest.raises(ValueError, match="--timeline is"):
        draw_timeline(DUAL, tmp_path / "a.jpg")


def test_the_title_tells_sizes_and_idle_share():
    assert title(simulate(make("dualpipe", 8, 20))) == (
        "dualpipe: 8 ranks, 20 micro-batches, 9.1% idle"
    )
    assert title(simulate(make("gpipe", 1, 1))) == "gpipe: 1 rank, 1 micro-batch, 0.0% idle"
