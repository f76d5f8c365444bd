"""Meshes that fit a model and a batch; what does not fit is told with the numbers."""

from dataclasses import replace

import pytest

from dsv3_jax.config import (
    DataConfig,
    MeshConfig,
    Phase,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from dsv3_jax.config.presets import tiny


def run(
    mesh: MeshConfig, rows: int = 8, microbatches: int = 1, length: int = 16, **model: int
) -> RunConfig:
    return RunConfig(
        model=replace(tiny(), **model),
        data=DataConfig(length=length),
        train=TrainConfig(rows=rows, microbatches=microbatches),
        mesh=mesh,
    )


def test_sizes_follow_from_the_axes():
    mesh = MeshConfig(data=2, node=4, local=8)
    assert (mesh.size, mesh.token_shards, mesh.expert_shards) == (64, 64, 32)
    assert MeshConfig().size == 1


@pytest.mark.parametrize(
    ("mesh", "others", "message"),
    [
        (
            {"node": 2, "local": 4},
            {"num_experts": 12},
            "model.num_experts is 12; allowed: multiples of the 8 devices of mesh.node",
        ),
        (
            {"node": 8},
            {},
            "model.num_groups is 4; allowed: multiples of mesh.node = 8",
        ),
        (
            {"data": 2, "local": 2},
            {"rows": 6},
            "train.rows / train.microbatches is 6; allowed: multiples of the 4 devices",
        ),
        (
            {"data": 4},
            {"rows": 8, "microbatches": 4},
            "train.rows / train.microbatches is 2; allowed: multiples of the 4 devices",
        ),
        (
            {"data": 2, "local": 4, "sequence": "local"},
            {"rows": 3},
            "train.rows / train.microbatches is 3; allowed: multiples of the 2 groups of 4",
        ),
        (
            {"node": 2, "local": 4, "sequence": "node_local"},
            {"length": 1000},
            "data.length is 1000; allowed: multiples of 16, two chunks for each of the 8 devices",
        ),
        ({"sequence": "data"}, {}, "mesh.sequence is 'data'; allowed: "),
        ({"data": 0}, {}, "mesh.data is 0; allowed: 1 to 1,048,576"),
        ({"local": True}, {}, "mesh.local is True; allowed: whole numbers"),
        ({"bucket_factor": 0.0}, {}, "mesh.bucket_factor is 0.0; allowed: above 0"),
        ({"bucket_factor": float("nan")}, {}, "mesh.bucket_factor is nan; allowed: finite"),
    ],
)
def test_what_does_not_fit_is_one_line(mesh: dict, others: dict, message: str):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(MeshConfig(**mesh), **others)


def test_without_groups_or_experts_nodes_are_free():
    run(MeshConfig(node=8), num_groups=1, num_kept_groups=1)
    run(MeshConfig(node=8), num_layers=1, num_dense_layers=1, mtp_depth=0)


def test_every_stair_of_a_batch_ramp_is_shared_evenly():
    """A stair is a multiple of a micro-batch, which the devices share."""
    cfg = run(MeshConfig(data=2), rows=8, microbatches=2)
    ramp = ScheduleConfig(rows_phases=(Phase(0, 100, 4, "constant"),))
    assert replace(cfg, schedule=ramp).schedule.rows_phases
    with pytest.raises(ValueError, match="allowed: multiples of a micro-batch, 4 rows"):
        replace(cfg, schedule=ScheduleConfig(rows_phases=(Phase(0, 100, 2, "constant"),)))
