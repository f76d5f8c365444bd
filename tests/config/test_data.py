"""Data options: what is refused with which words."""

import math

import pytest

from dsv3_jax.config import DataConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"source": ()},
            "data.source is empty; allowed: 'stdlib', globs or token folders",
        ),
        (
            {"source": ("a", "")},
            "data.source is empty; allowed: 'stdlib', globs or token folders",
        ),
        (
            {"source": ("a", "b"), "weights": (1.0,)},
            "data.weights has 1 values for 2 sources; allowed: one for each source, or none",
        ),
        (
            {"weights": (1.0, 2.0)},
            "data.weights has 2 values for 1 sources; allowed: one for each source, or none",
        ),
        (
            {"source": ("a", "b"), "weights": (0.0, 0.0)},
            "data.weights sum to 0; allowed: at least one above 0",
        ),
        (
            {"source": ("a", "b"), "weights": (1.0, -0.5)},
            "data.weights: a weight is -0.5; allowed: 0 or more",
        ),
        ({"fim_rate": 1.5}, "data.fim_rate is 1.5; allowed: 0 to 1"),
        ({"split_rate": -0.1}, "data.split_rate is -0.1; allowed: 0 to 1"),
        ({"bad_utf8": "ignore"}, "data.bad_utf8 is 'ignore'; allowed: 'reject', 'replace'"),
    ],
)
def test_impossible_data_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=r"^data\.") as error:
        DataConfig(**fields)
    assert str(error.value) == message


def test_weights_must_be_finite():
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^data\.weights is "):
            DataConfig(source=("a", "b"), weights=(1.0, weight))


def test_a_weight_of_zero_is_allowed_beside_others():
    assert DataConfig(source=("a", "b"), weights=(0.0, 2)).weights == (0.0, 2)
