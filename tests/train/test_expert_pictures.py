"""Heat maps show loads over the mean where and when they were; biases keep their layers."""

import base64
import io

import numpy as np

from dsv3_jax.train.expert_pictures import COLUMNS, bias_drift, heat_maps, loads_of, png_of
from tests.logged import OLD, make_entries


def experts(tokens: int, load_LE: list, layers: tuple[str, ...] = ("a", "b")) -> dict:
    entry = {"kind": "experts", "step": tokens, "tokens": tokens, "layers": list(layers)}
    return entry | {"load_LE": load_LE, "bias_LE": [[-tokens, tokens]] * len(layers)}


def pixels(address: str) -> np.ndarray:
    """Red, green, blue, alpha of a PNG in a data address, [E, COLUMNS, 4]."""
    from matplotlib.image import imread

    head, data = address.split(",")
    assert head == "data:image/png;base64"
    return imread(io.BytesIO(base64.b64decode(data)))


def test_shares_are_over_the_mean_of_the_layer():
    loads = loads_of([experts(5, [[1, 3], [10, 10]]), experts(9, [[0, 2], [0, 0]])])
    assert loads.layers == ["a", "b"]
    assert loads.tokens == [5.0, 9.0]
    expected = [[[0.5, 1.5], [1, 1]], [[0, 2], [np.nan, np.nan]]]
    assert np.array_equal(loads.shares_NLE, expected, equal_nan=True)


def test_entries_of_another_shape_or_without_loads_are_left_out():
    other = experts(1, [[1, 2]], layers=("a",))
    wider = experts(2, [[1, 2, 3], [4, 5, 6]])
    bare = {"kind": "experts", "step": 3}
    loads = loads_of([other, wider, bare, experts(4, [[1, 1], [1, 1]])])
    assert loads.tokens == [4.0]
    assert loads_of([bare, *OLD]) is None


def test_an_entry_covers_the_tokens_up_to_it():
    """Loads are those since the entry before: a quarter of the run is a quarter of the picture."""
    entries = [experts(30, [[0, 4], [2, 2]]), experts(120, [[4, 0], [2, 2]])]
    a, b = heat_maps(loads_of(entries))
    image = pixels(a.png)
    assert image.shape == (2, COLUMNS, 4)
    quarter = COLUMNS // 4
    blue, red = image[0, 0], image[1, 0]
    assert blue[2] > 0.3 > blue[0]
    assert red[0] > 0.3 > red[2]
    assert (image[0, :quarter] == blue).all()
    assert (image[0, quarter:] == red).all()
    assert (image[1, :quarter] == red).all()
    assert (a.busiest, a.idlest) == (2.0, 0.0)
    assert (pixels(b.png)[..., :3] > 0.9).all()  # balance is white
    assert heat_maps(loads_of(entries[::-1])) == [a, b]


def test_a_layer_without_tokens_is_transparent():
    image = pixels(png_of(np.array([[1.0, np.nan]])))
    assert image[0, :, 3].tolist() == [1.0, 0.0]


def test_biases_are_drawn_by_layer_or_of_all_or_not_at_all():
    assert [label for label, _ in bias_drift(make_entries()).legend] == [
        "layers.1",
        "layers.2",
        "mtp.0",
    ]
    many = experts(3, [[1, 1]] * 9, tuple("abcdefghi"))
    assert [label for label, _ in bias_drift([many]).legend] == ["a", "e", "i"]
    train = [entry for entry in make_entries() if entry["kind"] == "train"]
    assert [label for label, _ in bias_drift(train).legend] == ["all layers"]
    assert bias_drift(OLD) is None
