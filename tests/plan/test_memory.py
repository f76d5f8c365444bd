"""What a run holds, in closed form, is what its programs take and give."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import pytest

from dsv3_jax.config import (
    MeshConfig,
    Phase,
    PipelineConfig,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
)
from dsv3_jax.config.presets import dsv3_671b, tiny_run
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.schedules import NAMES, make, simulate
from dsv3_jax.plan.cuts import cuts_of
from dsv3_jax.plan.kept import Kept, rows_of
from dsv3_jax.plan.lowered import device_bytes
from dsv3_jax.plan.memory import changes_of, fullest, memory_of
from dsv3_jax.plan.parameters import Parameters
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_programs import PassPrograms
from dsv3_jax.train.rank_programs import RankPrograms
from tests.shapes import tiny_model

CLOSE = 0.04  # what is left out are flags and indices: a few bytes a token


def run_of(
    mesh: MeshConfig,
    schedule: str = "1f1b",
    recipe: str = "fp8",
    remat: str = "report",
    microbatches: int = 4,
    **model: object,
) -> RunConfig:
    run = tiny_run()
    return replace(
        run,
        model=replace(run.model, num_layers=4, **model),
        quant=QuantConfig(recipe),
        mesh=mesh,
        pipeline=PipelineConfig(schedule),
        train=replace(
            run.train,
            rows=mesh.token_shards * microbatches,
            microbatches=microbatches,
            remat=remat,
        ),
    )


class Traced:
    """A rank's programs by their shapes: the oracle."""

    def __init__(self, cfg: RunConfig, rank: int) -> None:
        self.layout = Layout(cfg, make_mesh(cfg.mesh), cuts_of(cfg))
        rows = cfg.train.rows // cfg.train.microbatches
        self.programs = RankPrograms(self.layout, rank, rows)
        mine, others = self.programs.mine, self.programs.others
        self.weights, _ = jax.eval_shape(self.programs.prepare, mine, others)
        self.sums, _ = jax.eval_shape(self.programs.zeros, self.weights)

    def chunks(self) -> Iterator[tuple]:
        """Cut, bytes of residuals, bytes of the tape."""
        passes = PassPrograms(self.programs)
        for chunk, of_chunk in self.programs.chunks.items():
            lowered = passes.trace([("F", chunk), ("b", chunk)])
            residuals, tape = lowered["F", chunk].out_info[1], lowered["b", chunk].out_info[2]
            yield of_chunk.stage.cut, device_bytes(residuals), device_bytes(tape)

    @property
    def state(self) -> int:
        layout = self.layout
        states = [
            layout.shardings[s].placed_shapes(layout.abstract(s)) for s in self.programs.owned
        ]
        return device_bytes(states)


QUICK = run_of(MeshConfig(2, node=2, local=2), schedule="dualpipe")
OTHERS = [
    run_of(MeshConfig(2, local=2), recipe="fp8_pow2", remat="none"),
    run_of(MeshConfig(2, local=2), recipe="fp8_per_tensor", q_latent=None),
    run_of(MeshConfig(2, local=2), recipe="bf16", remat="none"),
    run_of(MeshConfig(2, local=2), recipe="bf16", num_shared_experts=2),
    run_of(MeshConfig(2, data=2, local=2), recipe="f32", remat="full"),
    run_of(MeshConfig(2), recipe="f32", remat="none", q_latent=None),
    run_of(MeshConfig(2), schedule="dualpipev", tied_head=True),
    run_of(MeshConfig(4, local=2), schedule="zb1p", mtp_depth=2),
]


@pytest.mark.parametrize(
    "cfg",
    [QUICK, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in OTHERS)],
    ids=range(1 + len(OTHERS)),
)
def test_weights_gradients_and_state_are_those_of_the_programs(cfg: RunConfig):
    """To the byte, but for step counts and routers' biases."""
    plan, routers = memory_of(cfg), cfg.model.num_moe_layers + cfg.model.mtp_depth
    for rank in (0, cfg.mesh.pipe - 1):
        traced, planned = Traced(cfg, rank), plan.ranks[rank]
        assert planned.weights == device_bytes(traced.weights)
        assert planned.gradients == device_bytes(traced.sums)
        state = planned.masters + planned.moments
        assert 0 <= traced.state - state <= 4 * (routers * cfg.model.num_experts + 8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("cfg", [QUICK, *OTHERS], ids=range(1 + len(OTHERS)))
def test_what_a_micro_batch_keeps_is_what_programs_give(cfg: RunConfig):
    """But for flags. Its sibling in other tiers is with the tests of stages."""
    kept = Kept(cfg)
    for rank in (0, cfg.mesh.pipe - 1):
        for cut, residuals, tape in Traced(cfg, rank).chunks():
            assert sum(kept.residuals(cut).values()) == pytest.approx(residuals, rel=CLOSE)
            assert kept.tape(cut) == pytest.approx(tape, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_live_sets_are_the_simulators(name: str):
    """With all sets of one size."""
    for ranks, microbatches in ((2, 4), (4, 10), (8, 20)):
        schedule = make(name, ranks, microbatches)
        peak = simulate(schedule).peak
        ones = [1] * schedule.chunks
        assert [fullest(schedule, rank, ones, ones).size for rank in range(ranks)] == list(peak)


@pytest.mark.parametrize("name", ["zb1p", "dualpipe", "dualpipev"])
def test_the_fullest_moment_is_found_where_tapes_are_larger(name: str):
    """Slowly: the sets of every moment written down, the largest sum taken."""
    residuals, tapes = [3, 5], [7, 11]
    schedule = make(name, 4, 12)
    for rank in range(4):
        kept, left, sums = [], [], []
        split = {op.backward.chunk for op in schedule.operations(rank) if op.kind == "b"}
        for op in schedule.operations(rank):
            if op.forward:
                kept.append(op.forward)
                sums.append(total(kept, residuals) + total(left, tapes))
            if op.backward and op.kind != "W":
                kept.remove(op.backward)
                if op.kind == "b" or (op.kind == "B" and op.backward.chunk in split):
                    left.append(op.backward)
                    sums.append(total(kept, residuals) + total(left, tapes))
            if op.backward in left and op.kind in ("B", "W"):
                left.remove(op.backward)
        assert not kept
        assert not left
        assert fullest(schedule, rank, residuals, tapes).size == max(sums)


def total(works: list, sizes: list[int]) -> int:
    return sum(sizes[work.chunk] for work in works)


def test_the_reports_job_fits_its_devices():
    """74 of 80 GB on the fullest rank with FP8, DualPipe, ZeRO-1 and MTP; a middle one, where sets
    wait for W."""
    run = RunConfig(
        model=dsv3_671b(),
        data=replace(tiny_run().data, length=4096),
        train=replace(tiny_run().train, rows=15360, microbatches=120, remat="report"),
        quant=QuantConfig("fp8"),
        mesh=MeshConfig(16, 2, 8, 8),
        pipeline=PipelineConfig("dualpipe"),
    )
    plan = memory_of(run)
    assert [sum(rank.live.residuals.values()) for rank in plan.ranks[1:7]] == [17] * 6
    assert plan.fullest.rank in (7, 8)
    assert 74e9 < plan.most < 74.5e9
    assert plan.exceeds(80e9) == 0
    assert plan.exceeds(70e9) == plan.most - 70e9
    # 4 experts of 64 devices, 61 layers, two copies: 257 of 256 experts are 0.4 % shared.
    shard = Parameters(run)
    assert sum(shard.state(cut)["masters"] for cut in cuts_of(run)) == pytest.approx(
        4 * 684_489_845_504 / 2048 * 16, rel=0.02
    )


def test_what_to_change_is_listed_and_helps():
    plan = memory_of(QUICK)
    changes = changes_of(plan)
    assert {"--train.remat full", "--mesh.bucket-factor 1.0"} <= {c.text for c in changes}
    assert [c.most for c in changes] == sorted(c.most for c in changes)
    assert all(c.most < plan.most for c in changes)


def test_a_batch_that_shrinks_below_its_schedule_holds_what_it_held_before():
    """The last step falls back to 1F1B, which has the first copy of the stages alone."""
    large, pipe = run_of(QUICK.mesh, schedule="dualpipe", microbatches=8), QUICK.mesh.pipe
    ramp = ScheduleConfig(rows_phases=(Phase(0, 640, float(large.train.rows)),))
    rows = large.train.rows // 8 * (2 * pipe - 1)
    small = replace(large.train, rows=rows, microbatches=2 * pipe - 1)
    shrinks = memory_of(replace(large, train=small, schedule=ramp))
    assert shrinks.ranks == memory_of(large).ranks


def test_changes_with_workspace_count_it():
    plan = memory_of(QUICK)
    remat = next(c for c in changes_of(plan, True) if c.text == "--train.remat full")
    full = memory_of(replace(QUICK, train=replace(QUICK.train, remat="full"))).fullest
    assert (remat.most, remat.devices) == (full.total + full.workspace, QUICK.mesh.size)


def test_no_change_is_one_that_is_refused():
    """Twice as many ranks need twice as many micro-batches."""
    assert "--mesh.pipe 4" not in {change.text for change in changes_of(memory_of(QUICK))}
    enough = run_of(QUICK.mesh, schedule="dualpipe", microbatches=8)
    assert ("--mesh.pipe 4", 16) in {(c.text, c.devices) for c in changes_of(memory_of(enough))}


def test_a_schedule_that_would_take_hours_is_refused_and_advised_to_nobody():
    """Of the largest step, be it one of a ramp."""
    line = "mesh.pipe 1 times train.microbatches 300,000 is too large to simulate; allowed: up to"
    run = tiny_run()
    many = replace(run, train=replace(run.train, rows=300_000, microbatches=300_000))
    ramp = ScheduleConfig(rows_phases=(Phase(0, 640, 300_000.0),))
    ramped = replace(run, schedule=ramp, train=replace(run.train, rows=8, microbatches=8))
    for cfg in (many, ramped):
        with pytest.raises(ValueError, match=line):
            memory_of(cfg)
    one = memory_of(replace(run, train=replace(run.train, rows=10**8)))
    advised = {change.text.split()[0] for change in changes_of(one)}
    assert advised
    assert "--train.microbatches" not in advised


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_holds_the_whole_model_whatever_the_schedule(name: str):
    (rank,) = memory_of(run_of(MeshConfig(), schedule=name)).ranks
    assert rank.stages == ("E+4+H+M",)
    assert rank == memory_of(run_of(MeshConfig())).ranks[0]


@pytest.mark.parametrize(("factor", "rows"), [(1.0, 1), (4.0, 4)])
def test_rows_of_an_exchange_grow_with_its_buckets(factor: float, rows: int):
    cfg = replace(QUICK, mesh=replace(QUICK.mesh, bucket_factor=factor))
    one = rows_of(replace(QUICK, mesh=replace(QUICK.mesh, bucket_factor=1.0)))
    assert rows_of(cfg).hop_2 <= rows * one.hop_2
    assert rows_of(cfg).blocks >= rows_of(cfg).hop_2


def test_without_an_exchange_blocks_hold_all_copies():
    cfg = replace(tiny_run(), model=replace(tiny_model(), max_length=4096))
    rows = rows_of(cfg)
    tokens = cfg.train.rows * cfg.data.length
    assert (rows.tokens, rows.hop_1, rows.hop_2) == (tokens, 0, 0)
    assert rows.blocks >= tokens * cfg.model.experts_per_token
