"""What a plan says beside a run: lines of its start and end, kinds of devices, exhaustion."""

import math
from dataclasses import replace

import jax
import pytest

from dsv3_jax.config import DataConfig, MeshConfig, PipelineConfig, RunConfig, TrainConfig
from dsv3_jax.plan.hardware import H100, H200, H800, Hardware
from dsv3_jax.plan.memory import memory_of
from dsv3_jax.train import planned
from dsv3_jax.train.planned import (
    hardware_of,
    is_exhaustion,
    planned_of,
    size_of,
    told_of_exhaustion,
)
from dsv3_jax.train.step import abstract_state
from tests.shapes import tiny_model


@pytest.fixture(scope="module")
def cfg() -> RunConfig:
    model = tiny_model(num_experts=8, num_layers=4)
    mesh, pipeline = MeshConfig(pipe=2, local=2), PipelineConfig("1f1b")
    train = TrainConfig(rows=16, microbatches=4, dtype="bfloat16")
    return RunConfig(model, DataConfig(length=32), train, mesh=mesh, pipeline=pipeline)


def test_weights_at_hand_plan_as_much_as_traced_ones(cfg: RunConfig):
    plan = planned_of(cfg, abstract_state(cfg)[1].params)
    assert plan.memory == memory_of(cfg)
    assert math.isnan(plan.seconds)  # of a CPU no figures are known


@pytest.mark.parametrize(
    ("kind", "hardware"),
    [
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H800", H800),
        ("NVIDIA H200", H200),
        ("NVIDIA A100-SXM4-80GB", None),
        ("cpu", None),
        ("TPU v5 lite", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind: str, hardware: Hardware | None):
    assert hardware_of(kind) is hardware


def test_on_known_devices_times_are_planned_too(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planned, "hardware_of", lambda kind: H100)
    monkeypatch.setattr(planned, "device_peak_memory", lambda: 3 * 10**9)
    plan = planned_of(cfg)
    assert plan.begin().endswith(f"; a step in {plan.seconds:.3g} s")
    assert "on rank " in plan.begin()
    speed = f"12,345 tokens/s (planned {plan.tokens_per_second:,.0f})"
    assert plan.end(12345.0).startswith("measured   3.00 GB on the fullest device (planned ")
    assert plan.end(12345.0).endswith(speed)
    wide = replace(cfg, train=replace(cfg.train, dtype="float32"))
    assert math.isnan(planned_of(wide).seconds)  # whose rate on H100 is not known


def test_what_would_hold_less_is_named_with_its_size(cfg: RunConfig):
    line = told_of_exhaustion(cfg, MemoryError("9 bytes\ntoo many"))
    assert line.startswith("out of memory: 9 bytes too many; planned on rank ")
    rank = memory_of(cfg).fullest
    for name, size in rank.persistent.items():
        assert f"{name} {size_of(size)}" in line or not size
    assert "; smaller: --" in line
    assert "\n" not in line


def test_without_a_plan_its_fault_and_exhaustion_are_told_all_the_same(cfg: RunConfig, monkeypatch):
    def fail(*args: object) -> None:
        raise KeyError("a recipe\nthat is new")

    said: list[str] = []
    monkeypatch.setattr(planned, "memory_of", fail)
    assert planned_of(cfg, say=said.append) is None
    (line,) = said
    fault = r"KeyError: 'a recipe\nthat is new'"
    assert line == f"planned    nothing, since the plan failed ({fault}); the run goes on without"
    assert told_of_exhaustion(cfg, MemoryError("9")) == (
        "out of memory: 9; smaller: train.rows, or more train.microbatches"
    )


def test_without_advice_exhaustion_is_told_all_the_same(cfg: RunConfig, monkeypatch):
    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(planned, "changes_of", fail)
    assert told_of_exhaustion(cfg, MemoryError("9")).startswith("out of memory: 9; smaller: ")


def test_other_errors_are_no_exhaustion():
    assert is_exhaustion(MemoryError())
    assert is_exhaustion(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"))
    assert not is_exhaustion(jax.errors.JaxRuntimeError("INTERNAL: a fault of ours"))
