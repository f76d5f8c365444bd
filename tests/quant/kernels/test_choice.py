"""Who multiplies FP8, and what is said where no kernel can."""

from types import SimpleNamespace

import jax
import pytest

from dsv3_jax.config.quant import QuantConfig
from dsv3_jax.quant.kernels import choice
from dsv3_jax.quant.recipes import RECIPES, recipe_of


def hopper(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] = (0, 11, 2)) -> None:
    device = SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "__version_info__", version)


def test_without_a_hopper_gpu_the_definition_multiplies():
    assert recipe_of(QuantConfig("fp8")) == RECIPES["fp8"]
    with pytest.raises(ValueError, match="is on; allowed here: auto, off, since"):
        recipe_of(QuantConfig("fp8", kernels="on"))


def test_on_one_kernels_do_unless_they_are_off(monkeypatch: pytest.MonkeyPatch):
    hopper(monkeypatch)
    for asked in ("auto", "on"):
        rules = recipe_of(QuantConfig("fp8", kernels=asked)).values()
        assert all(rule.by_kernels for rule in rules)
    assert recipe_of(QuantConfig("fp8", kernels="off")) == RECIPES["fp8"]
    assert not recipe_of(QuantConfig("bf16"))
    assert recipe_of(QuantConfig("fp8_per_tensor")) == RECIPES["fp8_per_tensor"]  # has none


def test_an_older_jax_has_none(monkeypatch: pytest.MonkeyPatch):
    hopper(monkeypatch, (0, 10, 2))
    assert not choice.chosen("auto")
    with pytest.raises(ValueError, match=r"jax 0\.11 or later"):
        choice.chosen("on")


def test_nor_are_there_any_in_64_bits(monkeypatch: pytest.MonkeyPatch, x64):
    hopper(monkeypatch)
    assert not choice.chosen("auto")


def test_recipes_without_kernels_say_so():
    with pytest.raises(ValueError, match="allowed with it: fp8, fp8_pow2"):
        QuantConfig("fp8_per_tensor", kernels="on")
