"""Scores as tables and as a picture: each value in its place, orange for none and green for all."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from dsv3_jax.drawing import GREEN, ORANGE
from dsv3_jax.evaluate.needle_map import Map, draw_map, markdown, picture, terminal
from dsv3_jax.evaluate.needle_scores import Cell, Score
from dsv3_jax.evaluate.needles import Place


@pytest.fixture
def found() -> Map:
    exact = {(512, 0.0): 0.0, (512, 1.0): 0.25, (1024, 0.0): 0.5, (1024, 1.0): 1.0}
    cells = [Cell(Place(*place), 4, Score(x, x / 2, x - 9)) for place, x in exact.items()]
    return Map(cells[::-1])


def test_tables_have_a_line_for_each_depth_and_the_means(found):
    assert found.means() == [Score(0.125, 0.0625, -8.875), Score(0.75, 0.375, -8.25)]
    assert markdown(found, "exact").splitlines() == [
        "| depth | 512 | 1,024 |",
        "| --- | --- | --- |",
        "| 0% | 0% | 50% |",
        "| 100% | 25% | 100% |",
        "| mean | 12% | 75% |",
    ]
    assert markdown(found, "logprob").splitlines()[-1] == "| mean | -8.88 | -8.25 |"
    lines = [line.split() for line in terminal(found, "tokens").splitlines()]
    assert lines[0] == ["depth", "512", "1,024"]
    assert lines[2] == ["100%", "12%", "50%"]
    assert len({len(line) for line in terminal(found, "exact").splitlines()}) == 1


def test_the_picture_has_depths_downwards_and_lengths_to_the_right(found):
    figure = picture(found, "some $run$, step 5")
    (panel,) = figure.axes
    (image,) = panel.get_images()
    np.testing.assert_array_equal(image.get_array(), [[0, 0.5], [0.25, 1]])
    assert panel.get_title(loc="left") == "some $run$, step 5"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["512", "1,024"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0%", "100%"]
    assert panel.yaxis_inverted()
    written = {text.get_position(): text.get_text() for text in panel.texts}
    assert written == {(0, 0): "0%", (1, 0): "50%", (0, 1): "25%", (1, 1): "100%"}
    colours = image.cmap(image.norm(image.get_array()))
    np.testing.assert_allclose(colours[0, 0, :3], to_rgb(ORANGE), atol=0.01)
    np.testing.assert_allclose(colours[1, 1, :3], to_rgb(GREEN), atol=0.01)


def test_colours_mean_the_same_whatever_the_values_are(found):
    """A map of poor scores must not look like one of good ones."""
    cells = [Cell(Place(512, 0.0), 4, Score(0.1, 0.2, -9))]
    panel = picture(found, "").axes[0]
    panel.clear()
    draw_map(panel, Map(cells), "tokens")
    (image,) = panel.get_images()
    assert image.get_clim() == (0, 1)
