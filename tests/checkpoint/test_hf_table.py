"""The table between Hugging Face's names and ours, without an array."""

from dataclasses import replace

import pytest
from flax import nnx

from dsv3_jax.checkpoint.hf_table import abstract_model, entries, entry_count
from dsv3_jax.checkpoint.hf_writing import Writing
from dsv3_jax.checkpoint.tensor_file import Spec
from dsv3_jax.config import ModelConfig
from tests.checkpoint.hf_folders import BF16, F32, FAMILY, RAGGED, tensors_of


@pytest.mark.parametrize("changes", [{}, *FAMILY], ids=lambda changes: ", ".join(changes))
def test_the_table_names_a_release_and_nothing_else(changes: dict):
    cfg = replace(RAGGED, **changes)
    model = abstract_model(cfg)
    assert len(entries(cfg, nnx.split(model)[1])) == entry_count(cfg)
    specs = Writing(model, fp8=False, dtype="bfloat16").specs
    expected = {
        name: Spec(F32 if kind == "f32" else BF16, shape) for name, shape, kind in tensors_of(cfg)
    }
    assert specs == expected


def test_the_671b_release_has_91991_tensors_of_688574839360_bytes():
    """The published header's totals, and without layer 61."""
    for depth, count, size in ((1, 91_991, 688_574_839_360), (0, 90_427, 673_150_611_808)):
        cfg = ModelConfig(mtp_depth=depth)
        specs = Writing(abstract_model(cfg), fp8=True, dtype="bfloat16").specs
        assert len(specs) == count
        assert sum(spec.size for spec in specs.values()) == size
