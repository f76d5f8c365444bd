"""Times of layers, stages and steps, computed again term by term."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import MeshConfig, PipelineConfig, QuantConfig, RunConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.parallel.schedules import make, simulate
from dsv3_jax.plan.hardware import H800
from dsv3_jax.plan.layer_time import (
    Job,
    Time,
    exchange_parts,
    forward_parts,
    forward_time,
    gather_parts,
    input_gradient_parts,
    input_gradient_time,
    weight_gradient_parts,
    weight_gradient_time,
)
from dsv3_jax.plan.products import dense_layer, items_of, moe_layer
from dsv3_jax.plan.step_time import Stepper

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> RunConfig:
    """The report's job."""
    return load_config(ROOT / "configs" / "dsv3_671b.py")


@pytest.fixture(scope="module")
def job(report) -> Job:
    return Job(report, H800)


def named(parts) -> dict[str, float]:
    return {part.name: part.seconds for part in parts}


def test_a_moe_layer_forward_is_its_products_at_deepgemms_rates(job, report):
    """V3's shapes, the tables' numbers, all written out."""
    assert job.tokens == 4096
    found = named(forward_parts(job, moe_layer(report.model)))
    expected = {
        "q and kv down": 2 * 4096 * 7168 * 2112 / 1058e12,
        "q up": 2 * 4096 * 1536 * 24576 / 990e12,
        "kv up": 2 * 4096 * 512 * 32768 / 590e12,
        "attention output": 2 * 4096 * 16384 * 7168 / 1358e12,
        "gate": 2 * 4096 * 7168 * 256 / 580e12,
        "shared expert: gate and up": 2 * 4096 * 7168 * 4096 / 1304e12,
        "shared expert: down": 2 * 4096 * 2048 * 7168 / 1025e12,
        "experts: gate and up": 2 * 8 * 4096 * 7168 * 4096 / 1297e12,
        "experts: down": 2 * 8 * 4096 * 2048 * 7168 / 1099e12,
        "core attention": 2 * 4096 * 2048 * 128 * (192 + 128) / 580e12,
    }
    inputs = 7168 + 1536 + 512 + 16384 + 7168 + 2048 + 8 * (7168 + 2048)
    expected["FP8 casts of inputs"] = 4096 * inputs * (3 + 4 / 128) / 3000e9
    assert found == pytest.approx(expected)
    total = forward_time(job, moe_layer(report.model))
    assert total.compute == pytest.approx(sum(expected.values()))
    assert total.exchange == pytest.approx(4096 * 4 * (7392 / 46e9 + 14336 / 45e9))


def test_backward_adds_flash_attentions_products_and_the_recomputed_ones(job, report):
    forward = named(forward_parts(job, moe_layer(report.model)))
    backward = named(input_gradient_parts(job, moe_layer(report.model)))
    # Scores, gradients of queries and keys over 192; of weights and values over 128.
    assert backward["core attention"] / forward["core attention"] == pytest.approx(
        (3 * 192 + 2 * 128) / (192 + 128)
    )
    assert backward["q up, again"] == forward["q up"]
    assert backward["kv up, again"] == forward["kv up"]
    plain = replace(job, cfg=replace(report, train=replace(report.train, remat="none")))
    assert not any(
        "again" in part.name for part in input_gradient_parts(plain, dense_layer(report.model))
    )
    full = replace(job, cfg=replace(report, train=replace(report.train, remat="full")))
    layer = moe_layer(report.model)
    more = input_gradient_time(full, layer), input_gradient_time(plain, layer)
    assert more[0].compute - more[1].compute == pytest.approx(forward_time(job, layer).compute)
    assert more[0].exchange == pytest.approx(2 * more[1].exchange)


def test_a_fused_cast_takes_its_passes_away_and_nothing_else(job, report):
    fused = replace(job, fused_cast=True)
    for item in items_of(report.model)[1:5]:
        before, after = named(forward_parts(job, item)), named(forward_parts(fused, item))
        assert {name for name in before if name not in after} == {"FP8 casts of inputs"}
        assert weight_gradient_time(fused, item).compute < weight_gradient_time(job, item).compute


def test_small_products_take_as_long_as_their_traffic():
    run = replace(tiny_run(), quant=QuantConfig("fp8"))
    tokens, d, F, K, E = 8 * 256, 128, 128, 4, 16
    found = named(forward_parts(Job(run, H800), moe_layer(run.model)))
    moved = E * d * 2 * F + K * tokens * (d + 2 * 2 * F)  # FP8 in, BF16 out
    assert found["experts: gate and up"] == pytest.approx(moved / 3000e9)


def test_weight_gradients_are_products_and_both_operands_tiled_again(job, report):
    forward = named(forward_parts(job, moe_layer(report.model)))
    found = named(weight_gradient_parts(job, moe_layer(report.model)))
    inputs = 7168 + 1536 + 512 + 16384 + 7168 + 2048 + 8 * (7168 + 2048)
    columns = 2112 + 24576 + 32768 + 7168 + 4096 + 7168 + 8 * (4096 + 7168)
    twice = 4096 * 2 * (1 + 4 / 128) / 3000e9  # E4M3 read and written
    expected = {name: forward[name] for name in forward if "core" not in name and "FP8" not in name}
    expected["inputs in blocks of 128×1"] = twice * inputs
    expected["gradients in blocks of 128×1"] = twice * columns
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("length", "tera"), [(4096, 1297), (512, 1233), (256, 1040), (128, 932)])
def test_experts_run_at_the_rate_of_their_rows(report, length, tera):
    """Of 64 devices' tokens, an expert of 256 has 2 rows of each of a device."""
    cfg = replace(report, data=replace(report.data, length=length))
    parts = {part.name: part for part in forward_parts(Job(cfg, H800), moe_layer(report.model))}
    assert parts["experts: gate and up"].rate == tera * 1e12


def test_zero_moves_both_stages_of_a_rank_over_infiniband(job):
    """Stages E+4 and 1+H+M of ranks 0 and 15, counted from V3's sizes."""
    table, attention, expert = 129280 * 7168, 187_105_280, 44_040_192
    moe = attention + expert + 256 * 7168
    first = table + 3 * (attention + 396_361_728) + moe, 4 * expert
    last = 2 * moe + table + 2 * 7168**2, 2 * 4 * expert

    def owned(shared: int, experts: int) -> float:
        return shared / 128 + experts / 2

    crossing = sum(first) + sum(last) - owned(*first) - owned(*last)
    moved = (4 + 2) * (crossing + owned(*last))
    assert owned(*last) > owned(*first)
    assert Stepper(job).step(15360).sync == pytest.approx(moved / 50e9)


def test_within_a_node_zero_goes_over_nvlink():
    cfg = replace(tiny_run(), mesh=MeshConfig(data=8))
    stepper = Stepper(Job(cfg, H800))
    assert stepper.step(8).sync == pytest.approx(stepper.zero.total / 160e9)


def test_the_head_is_done_with_after_f(job, report):
    head = items_of(report.model)[62]
    product = 2 * 4096 * 7168 * 129280 / 580e12
    assert forward_time(job, head).alone == pytest.approx(3 * product)
    assert input_gradient_time(job, head).alone == weight_gradient_time(job, head).alone == 0


def test_bf16_has_no_casts_and_one_rate(report):
    job = Job(replace(report, quant=QuantConfig("bf16")), H800)
    parts = forward_parts(job, dense_layer(report.model))
    assert {part.rate for part in parts} == {580e12}
    assert [part.name for part in exchange_parts(job)] == ["dispatch", "combine"]


def test_within_one_node_rows_go_over_nvlink(report):
    cfg = replace(report, mesh=MeshConfig(local=8), pipeline=PipelineConfig())
    tokens = 128 // 8 * 4096
    dispatch, combine = exchange_parts(Job(cfg, H800))
    assert dispatch.seconds == pytest.approx(tokens * 8 * 7392 / 153e9)
    assert combine.seconds == pytest.approx(tokens * 8 * 14336 / 158e9)


@pytest.mark.parametrize(
    ("sequence", "node", "link"),
    [("local", 8, H800.nvlink), ("node_local", 8, H800.ib), ("node_local", 1, H800.nvlink)],
)
def test_latents_of_shared_rows_take_the_slowest_link_between_them(report, sequence, node, link):
    mesh = replace(report.mesh, sequence=sequence, node=node)
    (part,) = gather_parts(Job(replace(report, mesh=mesh), H800))
    assert (part.rate, part.source) == (link.value, link.source)


def test_a_slow_nvlink_bounds_the_exchange(job, report):
    slow = replace(H800, nvlink=replace(H800.nvlink, value=20e9))
    dispatch, _ = exchange_parts(replace(job, hardware=slow))
    assert dispatch.name == "dispatch within nodes"
    assert dispatch.seconds == pytest.approx(4096 * 8 * 7392 / 20e9)


def test_a_stage_is_the_sum_of_its_items(job, report):
    stepper, items = Stepper(job), items_of(report.model)
    assert (str(stepper.cuts[0]), str(stepper.cuts[-1])) == ("E+4", "1+H+M")
    last = stepper.stages[-1]
    here = [items[61], items[62], items[63]]
    assert last.forward.alone == pytest.approx(sum(forward_time(job, i).alone for i in here))
    assert last.backward.compute == pytest.approx(
        sum(
            input_gradient_time(job, i).compute + weight_gradient_time(job, i).compute for i in here
        )
    )


def test_pairs_hide_the_exchange_and_pay_with_sms(job):
    time = Stepper(job).stages[1]
    both = time.forward + time.backward
    assert Stepper(job).overlap.pair(both) == pytest.approx(
        max(both.compute * 132 / 112, both.exchange)
    )
    lone = Time(compute=10.0, exchange=0.1)  # 20 SMs less would cost more than is hidden
    assert Stepper(job).overlap.pair(lone) == lone.alone
    assert Stepper(job, overlap=False).overlap.pair(both) == both.compute + both.exchange


def even(schedule: str, ranks: int, microbatches: int) -> RunConfig:
    """A run whose stages cost the same, on devices without an exchange."""
    run = tiny_run()
    model = replace(run.model, num_layers=2 * ranks, num_dense_layers=2 * ranks, mtp_depth=0)
    # E and H cost least where the vocabulary is a token: stages differ in nothing that counts.
    model = replace(model, vocab_size=2, bos_id=0, eos_id=1)
    return replace(
        run,
        model=model,
        train=replace(run.train, rows=microbatches, microbatches=microbatches),
        mesh=MeshConfig(pipe=ranks),
        pipeline=PipelineConfig(schedule),
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb1p"])
def test_the_bubble_is_the_simulators(schedule):
    """Each rank with the times of its own stage."""
    stepper = Stepper(Job(even(schedule, 4, 8), H800))
    times = {}
    for rank, stage in enumerate(stepper.stages):
        F, b, W = (time.alone for time in (stage.forward, stage.inputs, stage.weights))
        times |= {(rank, "F"): F, (rank, "b"): b, (rank, "W"): W, (rank, "B"): b + W}
    expected = simulate(make(schedule, 4, 8), measured=times)
    found = stepper.step(8).timeline
    assert found.makespan == pytest.approx(expected.makespan)
    assert found.idle == pytest.approx(expected.idle)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_so_it_is_with_two_stages_on_a_rank(schedule):
    """All with the second stage's times; the first and the last one have little more to do."""
    stepper = Stepper(Job(even(schedule, 4, 8), H800))
    stage = stepper.stages[1]
    F, W = stage.forward.alone, stage.weights.alone
    B = stage.inputs.alone + W
    expected = simulate(make(schedule, 4, 8), F, B, W, F + B)
    found = stepper.step(8).timeline
    assert found.makespan == pytest.approx(expected.makespan, rel=0.03)
    assert found.idle_share == pytest.approx(expected.idle_share, abs=0.03)


def test_without_overlap_neighbours_stop_for_messages():
    cfg = even("1f1b", 4, 8)
    hidden, seen = (Stepper(Job(cfg, H800), on) for on in (True, False))
    assert seen.step(8).seconds > hidden.step(8).seconds
    # One device each on one node: over NVLink.
    assert seen.message == pytest.approx(256 * 128 * 2 / 160e9)


def test_one_rank_has_no_bubble_and_runs_micro_batches_in_turn():
    cfg = tiny_run()
    stepper = Stepper(Job(cfg, H800))
    step = stepper.step(cfg.train.rows)
    (stage,) = stepper.stages
    assert step.timeline.bubble == 0
    assert step.timeline.makespan == pytest.approx(stage.forward.alone + stage.backward.alone)
    assert step.sync == 0


def test_steps_of_a_ramp_that_dualpipe_cannot_run_are_1f1b(job):
    stepper = Stepper(job)
    small, full = stepper.step(3072), stepper.step(15360)
    assert (small.schedule, small.timeline.schedule.microbatches) == ("1f1b", 24)
    assert (full.schedule, full.timeline.schedule.microbatches) == ("dualpipe", 120)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mesh": MeshConfig(local=16)}, "mesh.local is 16; .*at most the 8 devices of a node"),
        ({"quant": QuantConfig("f32")}, "train.dtype is float32; .*h800: bfloat16, of which"),
        (
            {"train": replace(tiny_run().train, dtype="float64"), "quant": QuantConfig("fp8")},
            "train.dtype is float64",
        ),
        ({"pipeline": PipelineConfig("1f1b", "E+61+H+M")}, "pipeline.stages"),
    ],
)
def test_runs_that_these_devices_cannot_be_asked_for_are_refused(report, change, line):
    cfg = replace(report, mesh=MeshConfig(), pipeline=PipelineConfig())
    with pytest.raises(ValueError, match=line):
        Stepper(Job(replace(cfg, **change), H800))


def test_schedules_that_would_take_minutes_are_refused(report):
    cfg = replace(
        even("1f1b", 4, 8), train=replace(tiny_run().train, rows=30000, microbatches=30000)
    )
    with pytest.raises(ValueError, match="too large to simulate; allowed: up to 100,000"):
        Stepper(Job(cfg, H800)).step(30000)
