"""An engine gets the sizes that its texts need, and its errors are told by the options' names."""

import pytest

from dsv3_jax.inference.options import EngineOptions, MeshOptions
from dsv3_jax.inference.settings import EngineConfig


@pytest.mark.parametrize(
    ("options", "lengths", "rows", "pages"),
    [
        (EngineOptions(), [65], 1, 2),
        (EngineOptions(), [64, 1, 65], 3, 4),
        (EngineOptions(), [64] * 100, 16, 16),
        (EngineOptions(rows=2), [1, 200, 64, 65], 2, 6),  # the longest two
        (EngineOptions(rows=5, pages=7), [500], 5, 7),
        (EngineOptions(page_slots=4), [], 1, None),
        (EngineOptions(mesh=MeshOptions(2, 1, 3)), [64] * 13, 3, 3),
    ],
)
def test_rows_and_pages_are_as_many_as_the_texts_need(options, lengths, rows, pages):
    settings = options.settings(lengths)
    assert (settings.rows, settings.pages) == (rows, pages)


def test_what_is_given_is_what_the_engine_gets():
    options = EngineOptions(3, 2, True, 8, 40, 32)
    expected = EngineConfig(rows=3, drafts=2, fp8_cache=True, page_slots=8, pages=40, chunk=32)
    assert options.settings([9]) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (EngineOptions(rows=0), "--rows is 0; allowed: at least 1"),
        (EngineOptions(page_slots=0), "--page-slots is 0; allowed: at least 1"),
        (EngineOptions(pages=0), "--pages is 0; allowed: at least 1"),
        (EngineOptions(chunk=-1), "--chunk is -1; allowed: at least 1"),
        (EngineOptions(drafts=-1), "--drafts is -1; allowed: 0 or more"),
        (EngineOptions(mesh=MeshOptions(node=0)), "mesh.node is 0; allowed: 1 to"),
    ],
)
def test_what_cannot_be_is_told_by_the_name_of_the_option(options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        options.check()
