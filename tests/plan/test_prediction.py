"""From FLOPs of a token to money: every printed line computed again from those above it."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.config.stairs import stairs
from dsv3_jax.plan.derivation import derivation
from dsv3_jax.plan.hardware import H100, H800, WhatIf
from dsv3_jax.plan.prediction import Prediction, predict
from dsv3_jax.plan.terms import terms_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> Prediction:
    return predict(load_config(ROOT / "configs" / "dsv3_671b.py"), H800)


@pytest.fixture(scope="module")
def full(report) -> RunConfig:
    """The report's job without its ramp, all steps at the full batch."""
    return replace(report.cfg, schedule=replace(report.cfg.schedule, rows_phases=()))


@pytest.fixture(scope="module")
def lines(report) -> dict[str, float]:
    """Values by label where it is the only one, by section and label everywhere."""
    made = derivation(report)
    labels = [line.label for line in made]
    alone = {line.label: line.value for line in made if labels.count(line.label) == 1}
    return alone | {f"{line.section.split(',')[0]}: {line.label}": line.value for line in made}


def test_flops_of_a_token_in_both_countings(lines):
    assert lines["FLOPs, causal"] == pytest.approx(250.456, abs=1e-3)
    assert lines["FLOPs, full attention"] == pytest.approx(281.158, abs=1e-3)
    assert lines["FLOPs, causal, with MTP"] == pytest.approx(260.6, abs=0.1)
    assert lines["FLOPs, full attention, with MTP"] == pytest.approx(291.8, abs=0.1)


def test_bytes_of_a_token_and_of_a_step(lines):
    assert lines["dispatch: a token"] == 7392
    assert lines["combine: a token"] == 14336
    assert lines["dispatch: between nodes"] == 4 * 7392
    a_layer = 2 * (4 + 8) * (7392 + 14336)
    # A device has one of 16 parts of all layers, and 1/128 of the tokens.
    assert lines["exchange, a device and step"] == pytest.approx(
        a_layer * 59 * 15360 * 4096 / 2048 / 1e9
    )


@pytest.mark.parametrize("item", ["embedding", "dense layer", "MoE layer", "head", "MTP module"])
def test_terms_add_up_to_the_time_of_an_item(lines, item):
    def of(letter: str) -> dict[str, float]:
        start = f"{item}: {letter}: "
        return {k.removeprefix(start): v for k, v in lines.items() if k.startswith(start)}

    forward, inputs, weights = of("F"), of("b"), of("W")
    assert sum(forward.values()) == pytest.approx(lines[f"{item}: F"])
    special = ("rows looked up", "core attention", "FP8 casts of inputs", "dispatch", "combine")
    # The head's gradients are made in F.
    again = [name for name in forward if name not in special and not name.startswith("head")]
    products = sum(forward[name] for name in again)
    assert products + sum(inputs.values()) == pytest.approx(lines[f"{item}: b"])
    assert products + sum(weights.values()) == pytest.approx(lines[f"{item}: W"])


def test_lines_multiply_to_the_device_hours(lines, report):
    """Independently: 120 micro-batches, 2,048 devices, $2, 989.5 TFLOPS, 15,360 rows of 4,096."""
    step = lines["operations"] + lines["bubble"] + lines["ZeRO-1"] + lines["update"]
    assert step == pytest.approx(lines["step"])
    tokens = 15360 * 4096 / step / 2048
    assert tokens == pytest.approx(lines["tokens/s of a device"])
    hours = 1e12 / tokens / 3600
    assert hours == pytest.approx(lines["device-hours per 1T tokens"])
    assert hours * 2 == pytest.approx(lines["money per 1T tokens"])
    for counting in ("causal", "full attention", "causal, with MTP", "full attention, with MTP"):
        mfu = lines[f"FLOPs, {counting}"] * 1e9 * tokens / 989.5e12
        assert lines[f"MFU, {counting}"] == pytest.approx(100 * mfu)
    assert lines["the report's"] == 180e3
    assert lines["fitted factor"] == pytest.approx(180e3 / hours)


def test_the_hours_are_their_terms_largest_first(report, lines):
    terms = terms_of(report)
    assert list(terms.values()) == sorted(terms.values(), reverse=True)
    assert min(terms.values()) >= 0
    assert sum(terms.values()) == pytest.approx(report.step.seconds)
    assert next(iter(terms)) == "matrix products"
    hours = sum(lines[f"spent on {name}"] for name in terms)
    assert hours == pytest.approx(lines["device-hours per 1T tokens"])
    assert hours + lines["published beyond these"] == pytest.approx(180e3)
    # 2,048 devices, 250.456 GFLOPs a token: the day's tokens as MFU.
    assert lines["MFU, published"] == pytest.approx(
        100 * 272.8e9 / 86400 / 2048 * 250.456e9 / 989.5e12, rel=0.003
    )
    assert lines["MFU, predicted"] == lines["MFU, causal"]
    seconds = sum(time.compute for s in report.stepper.stages for time in (s.forward, s.backward))
    kinds = {"matrix products", "core attention", "recomputation", "quantisation in device memory"}
    computed = sum(terms[kind] for kind in kinds) + terms["rows of the embedding"]
    assert computed == pytest.approx(seconds * 120 / 16)


def test_operations_are_the_stages_times_over_all_micro_batches(lines, report):
    """In units of a stage: F, B or FB of each micro-batch; pairs last max, others the sum."""
    step, total = report.step, 0.0
    for span in step.timeline.spans:
        total += span.end - span.start
    assert lines["operations"] == pytest.approx(total / 16)
    assert lines["pipeline"] == pytest.approx(max(span.end for span in step.timeline.spans))
    most = sum((s.forward + s.backward).alone for s in report.stepper.stages) * 120 / 16
    least = sum((s.forward + s.backward).compute for s in report.stepper.stages) * 120 / 16
    assert least < lines["operations"] < most


def test_the_bubble_is_told_by_rank_beside_that_of_even_stages(lines, report):
    timeline, stages = report.step.timeline, report.stepper.stages
    told = {line.label: line for line in derivation(report)}
    for word, idle in (("most", max(timeline.idle)), ("least", min(timeline.idle))):
        line = told[f"rank that idles {word}"]
        rank = int(line.formula.removeprefix("rank ").partition(":")[0])
        assert line.value == timeline.idle[rank] == idle
        assert f"stage {rank} ({stages[rank].cut}), stage {15 - rank} (" in line.formula
    slowest = max((s.forward + s.backward).alone for s in stages)
    assert lines["slowest stage"] == pytest.approx(slowest * 1e3)
    # Most of it is there because stages are not even.
    assert 0 < lines["bubble if stages were even"] < lines["bubble"] / 2
    pair, back, weights = (
        sum(times) / 16
        for times in (
            [report.stepper.overlap.pair(s.forward + s.backward) for s in stages],
            [s.backward.alone for s in stages],
            [s.weights.alone for s in stages],
        )
    )
    assert lines["bubble if stages were even"] == pytest.approx(7 * (pair + back - 3 * weights))


def test_overlap_that_is_given_up_is_told(report, full):
    def how(prediction: Prediction) -> str:
        return next(x.formula for x in derivation(prediction) if x.label.startswith("pair FB"))

    assert "given up" not in how(report)
    assert "given up" not in how(predict(full, H800, overlap=False))
    greedy = predict(full, H800, what_if=WhatIf(comm_sms=131))
    assert how(greedy).startswith("F + B: overlap given up on 16 of 16 stages")
    pairs = {greedy.stepper.overlap.pair(s.forward + s.backward) for s in greedy.stepper.stages}
    assert pairs == {(s.forward + s.backward).alone for s in greedy.stepper.stages}


def test_the_predicted_hours_are_below_the_reports_and_of_its_size(lines):
    """What is not counted only adds; more than half of the time is accounted for."""
    assert 90e3 < lines["device-hours per 1T tokens"] < 180e3


def test_the_run_is_the_sum_of_its_steps(report, lines):
    cfg, tokens, seconds, consumed = report.cfg, 0, 0.0, 0
    for rows, count in stairs(cfg, 0, cfg.train.steps):
        assert rows == cfg.train.rows or consumed * 4096 < 469e9
        consumed += rows * count
        tokens += rows * count * 4096
        seconds += report.stepper.step(rows).seconds * count
    assert sum(count for _, count in report.run) == cfg.train.steps
    assert lines["tokens of the run"] == tokens
    assert 14.8e12 <= tokens < 14.8e12 + 15360 * 4096
    assert lines["device-hours of the run"] == pytest.approx(seconds * 2048 / 3600)
    assert lines["money of the run"] == pytest.approx(seconds * 2048 / 3600 * 2)
    assert lines["days of the run"] == pytest.approx(seconds / 86400)


def test_the_reports_balance_of_links(lines, report):
    assert lines["experts a node for free"] == 3.2
    assert lines["experts a token, same cost"] == pytest.approx(13, abs=0.3)
    time = [stage.forward + stage.backward for stage in report.stepper.stages]
    ratio = sum(t.compute for t in time) / sum(t.exchange for t in time)
    assert lines["computation : exchange, no overlap"] == pytest.approx(ratio)
    assert 0.5 < ratio < 2  # about 1 : 1 (3.2.1)


@pytest.mark.parametrize(
    ("what_if", "faster"),
    [
        (WhatIf(comm_sms=0), True),
        (WhatIf(comm_sms=40), False),
        (WhatIf(fused_cast=True), True),
        (WhatIf(ib=100), True),
        (WhatIf(ib=20), False),
        (WhatIf(nvlink=40), False),
    ],
    ids=str,
)
def test_what_ifs_move_the_hours_the_right_way(report, full, what_if, faster):
    other = predict(full, H800, what_if=what_if)
    assert (other.hours_per_trillion < report.hours_per_trillion) == faster
    assert other.hours_per_trillion != report.hours_per_trillion
    assert not any(line.label == "fitted factor" for line in derivation(other))


def test_without_overlap_a_step_takes_longer(report):
    slow = predict(report.cfg, H800, overlap=False)
    assert slow.step.seconds > report.step.seconds
    assert not slow.plain


def test_money_needs_a_price():
    cfg = tiny_run()
    known, asked = predict(cfg, H100), predict(cfg, H100, price=3.5)
    assert known.dollars(1) is None
    assert not any("money" in line.label for line in derivation(known))
    assert asked.dollars(10) == 35
    assert predict(cfg, H800, price=0).dollars(10) == 0
    with pytest.raises(ValueError, match="--price is -1; allowed: 0 to 1,000,000"):
        predict(cfg, H800, price=-1)


def test_only_the_reports_model_on_h800_stands_beside_it(report):
    assert predict(report.cfg, H100).reported is None
    assert predict(tiny_run(), H800).reported is None


def test_lines_are_there_for_a_run_without_mesh_or_mtp():
    run = tiny_run()
    plain = replace(run, model=replace(run.model, mtp_depth=0))
    labels = [line.label for line in derivation(predict(plain, H800))]
    assert "step" in labels
    assert not any("MTP" in label or "exchange" in label or "ZeRO-1 s" in label for label in labels)
