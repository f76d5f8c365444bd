"""Experts move while an engine serves, and no text can tell."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.expert_service import ExpertService
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import Weights, lay_out
from dsv3_jax.parallel.mesh import make_mesh
from tests.inference.engines import (
    LARGER,
    MODEL,
    check_texts,
    count_compilations,
    play,
    random_requests,
)
from tests.shapes import random_model

SHARED = replace(MODEL, num_shared_experts=2)


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_layers_move_one_at_a_time_and_every_slot_has_the_expert_that_its_table_says():
    clock, settings = Clock(), EngineConfig(replicas=4, drafts=1, rebalance_seconds=10)
    weights = lay_out(random_model(MODEL), drafts=1)
    mesh = make_mesh(MeshConfig(local=2), jax.devices())
    service = ExpertService(MODEL, settings, mesh, clock)
    served = service.laid_out(weights)
    assert_in_slots(served, weights)
    assert not service.due
    clock.now = 10
    assert service.due
    load_LE = np.ones((2, MODEL.num_experts))
    load_LE[0, 5] = load_LE[1, 2] = 100
    service.place(load_LE)
    busiest = [
        (table_P == e).sum() for table_P, e in zip(service.last.tables[0], (5, 2), strict=True)
    ]
    assert busiest == [5, 5]  # all copies there are
    service.warm_up(served)  # moves nothing
    seen = []
    while service.moving:
        served = service.move(served)
        assert_in_slots(served, weights)
        seen.append([int(layer.placement.count_E.max()) for layer in routed(served)])
    assert seen[-1] == [5, 5]
    assert len(seen) == 2
    assert seen[0] != seen[-1]


def test_a_model_without_routers_has_no_loads_and_nothing_to_place():
    dense = replace(MODEL, num_dense_layers=1, mtp_depth=0)
    engine = Engine(lay_out(random_model(dense)), EngineConfig(rows=1, replicas=2))
    assert engine.take_loads().shape == (0, MODEL.num_experts)
    assert not engine.service.due
    assert engine.service.balancer is None


def routed(weights: Weights) -> list:
    return [*weights.layers, *(depth.layer for depth in weights.depths)]


def assert_in_slots(served: Weights, weights: Weights) -> None:
    """What a placement calls expert e is expert e, wherever it lies."""
    for layer, plain in zip(routed(served), routed(weights), strict=True):
        physical_EC, count_E = (np.asarray(x) for x in layer.placement)
        for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
            slots, experts = (np.asarray(getattr(x.block.moe, name)[...]) for x in (layer, plain))
            for e, count in enumerate(count_E):
                assert count >= 1
                for slot in physical_EC[e, :count]:
                    assert np.array_equal(slots[slot], experts[e])


def serve_and_move(cfg, mesh: MeshConfig, requests: int, **settings: object) -> Engine:
    """Experts are placed anew every seventh turn."""
    model, clock = random_model(cfg), Clock()
    small = EngineConfig(rows=2, page_slots=4, pages=20, chunk=16, rebalance_seconds=7, **settings)
    engine = Engine(
        lay_out(model, drafts=small.drafts), small, make_mesh(mesh, jax.devices()), clock
    )
    engine.warm_up()
    turn, moved = engine.turn, set()

    def ticking():
        clock.now += 1
        answers = turn()
        if engine.service.last is not None and engine.service.last.moves_L.any():
            moved.add(id(engine.service.last))
        return answers

    engine.turn = ticking
    with count_compilations() as compiled:
        told = play(engine, random_requests(cfg, requests, seed=1))
    assert not compiled
    assert check_texts(model, told) == 0
    assert moved
    return engine


@pytest.mark.slow
def test_texts_are_the_models_own_while_copies_of_experts_move_between_devices():
    """Two shared experts among the routed ones, and an MTP module's experts too."""
    engine = serve_and_move(
        SHARED, MeshConfig(node=2, local=2), 24, drafts=1, replicas=6, shared_as_routed=True
    )
    load_LE = engine.service.balancer.tables.count_LE
    assert (load_LE[:, MODEL.num_experts :] > 1).all()  # whom every token uses has copies


@pytest.mark.exhaustive
@pytest.mark.parametrize("placement", ["global", "hierarchical"])
@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 2, 2)], ids=str)
def test_texts_of_64_requests_while_experts_move(placement: str, sizes: tuple[int, int, int]):
    mesh = MeshConfig(data=sizes[0], node=sizes[1], local=sizes[2])
    serve_and_move(LARGER, mesh, 64, drafts=2, replicas=8, placement=placement)
