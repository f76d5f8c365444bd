"""Rollouts: the engine's texts of a model in training, the same whenever they are drawn."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import (
    DataConfig,
    MeshConfig,
    PipelineConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.inference import programs
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.posttrain.rl_prompts import PromptSet, RLPrompt, encode_prompts
from dsv3_jax.posttrain.rl_rows import pack, rows_needed
from dsv3_jax.posttrain.rollouts import Drawing, Group, Rollouts, handed_over
from dsv3_jax.train.pipeline_run import PipelineRun
from dsv3_jax.train.pipeline_state import from_whole
from dsv3_jax.train.sharding import make_sharding
from dsv3_jax.train.step import TrainState, abstract_state
from tests.chat_tokenizer import chat_tokenizer
from tests.inference.engines import count_compilations, programs_compiled_once
from tests.runs import jax_option, random_state
from tests.shapes import FAST_COMPILATION, compiled, random_model, tiny_model

# A small init: what comes next is nearly even over the 261 ids, so that texts differ.
MODEL = tiny_model(vocab_size=264, num_layers=2, init_std=0.1)
CFG = RunConfig(
    model=MODEL,
    data=DataConfig(source="p.jsonl", length=48, format="messages", isolate=True),
    train=TrainConfig(rows=4, dtype="float32"),
)
DRAWING = Drawing(group=4, max_tokens=12, seed=3, rows=8)
TOKENIZER = chat_tokenizer()
# So many tokens end a text that some do: no text of 12 would else.
END_IDS = frozenset([TOKENIZER.eos_id, *range(40, 60)])


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, jax_option("jax_disable_most_optimizations"):
        patch.setattr(programs, "COMPILER_OPTIONS", FAST_COMPILATION)
        with programs_compiled_once():
            yield


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    asked = ["1+1", "12+34", "7", "what is 5+6?", "0+0"]
    made = [
        RLPrompt(str(i), f"f line {i}", text, [{"role": "user", "content": text}], str(i), {"n": i})
        for i, text in enumerate(asked)
    ]
    return encode_prompts(made, ChatTemplate(TOKENIZER), 30)


def state_of(seed: int = 0, cfg: RunConfig = CFG) -> tuple[nnx.GraphDef, TrainState]:
    graphdef, params, biases = nnx.split(random_model(cfg.model, seed=seed), nnx.Param, RouterBias)
    return graphdef, TrainState(params, biases, ())


def rollouts_of(prompts: PromptSet, cfg: RunConfig = CFG, drawing: Drawing = DRAWING) -> Rollouts:
    return Rollouts(cfg, state_of(cfg=cfg)[0], TOKENIZER, prompts, drawing, END_IDS)


@pytest.fixture(scope="module")
def rollouts(prompts: PromptSet) -> Rollouts:
    return rollouts_of(prompts)


@pytest.fixture(scope="module")
def groups(rollouts: Rollouts) -> list[Group]:
    return rollouts.groups(state_of()[1], [2, 0, 3], batch=7)


def test_a_group_holds_different_answers_to_its_prompt(groups):
    assert [group.prompt for group in groups] == [2, 0, 3]
    for group in groups:
        assert len(group.outputs) == 4
        assert len({tuple(output.tokens) for output in group.outputs}) == 4
    outputs = [output for group in groups for output in group.outputs]
    assert {output.ended for output in outputs} == {True, False}
    for output in outputs:
        assert len(output.tokens) == len(output.logprobs)
        assert [token in END_IDS for token in output.tokens[:-1]].count(True) == 0
        assert (output.tokens[-1] in END_IDS) == output.ended
        assert output.ended or len(output.tokens) == 12
        shown = output.tokens[: len(output.tokens) - output.ended]
        assert output.text == b"".join(TOKENIZER.token_bytes[t] for t in shown if t < 261).decode(
            errors="replace"
        )


def test_the_same_is_drawn_again_and_beside_other_groups(rollouts, groups):
    """Bit for bit, whoever wrote before and whoever waits; 8 of 12 answers go on at a time."""
    weights = state_of()[1]
    assert rollouts.groups(weights, [2, 0, 3], batch=7) == groups
    assert rollouts.groups(weights, [2, 4, 1], batch=7)[0] == groups[0]
    assert rollouts.groups(weights, [2], batch=7) == groups[:1]


def test_seeds_differ_between_runs_batches_places_prompts_and_answers():
    seeds = {
        replace(DRAWING, seed=run).seed_of(batch, place, prompt, number)
        for run in range(3)
        for batch in range(3)
        for place in range(3)
        for prompt in range(3)
        for number in range(3)
    }
    assert len(seeds) == 3**5
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_weights_of_the_next_step_are_taken_without_a_compilation(rollouts, groups):
    other = state_of(seed=1)[1]
    rollouts.groups(other, [2, 0, 3], batch=7)
    again = state_of(seed=2)[1]
    with count_compilations() as compilations:
        found = rollouts.groups(again, [2, 0, 3], batch=8)
    assert compilations == []
    assert found != groups


def test_progress_is_told(rollouts):
    told = []
    rollouts.groups(state_of()[1], [1], batch=0, told=lambda *numbers: told.append(numbers))
    assert told[-1] == (4, 4)
    assert told == sorted(told)


def test_what_prompt_and_answer_do_not_fit_is_refused(prompts):
    with pytest.raises(ValueError, match="an answer of 60; allowed: together at most"):
        rollouts_of(prompts, drawing=replace(DRAWING, max_tokens=60))


def test_groups_survive_json(groups):
    assert [Group.of_json(one) for one in json.loads(json.dumps(groups))] == groups


def test_attempts_are_what_rewards_look_at(rollouts):
    """In order; reasoning is split off."""
    tokens = [*TOKENIZER.encode("<think>a</think>b").tolist(), TOKENIZER.eos_id]
    made = rollouts._output(tokens, [0.0] * len(tokens), True)
    (attempt,) = rollouts.attempts([Group(3, [made])])
    assert (attempt.prompt, attempt.text, attempt.reasoning) == ("what is 5+6?", "b", "a")
    assert (attempt.reference, attempt.fields, attempt.id) == ("3", {"n": 3}, "3")
    assert (attempt.cut, attempt.tokens) == (False, len(tokens))


def training_logprobs(cfg: RunConfig, state: TrainState, batch) -> np.ndarray:
    """Of all labels by one forward pass over the packed rows, in float64 from there on."""
    graphdef = state_of(cfg=cfg)[0]

    @compiled
    def logits(params, biases):
        model: DeepSeekV3 = nnx.merge(graphdef, params, biases)
        h_BTD, _ = model.hidden(
            batch.tokens_BT, dtype=np.dtype(cfg.train.dtype), segments_BT=batch.segments_BT
        )
        return model.logits(h_BTD)

    logits_BTV = np.asarray(logits(state.params, state.biases), np.float64)
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    labels_BT = np.maximum(batch.labels_BT, 0)
    return np.take_along_axis(logp_BTV, labels_BT[..., None], -1)[..., 0]


def test_log_probabilities_are_those_of_the_training_forward_pass(prompts, groups):
    """Within 1e-4 in float32: sums in another order, nothing else."""
    rows = rows_needed(12, prompts.longest + 11, 48)
    packed = pack(prompts, groups, 48, rows, TOKENIZER.eos_id)
    logp_BT = training_logprobs(CFG, state_of()[1], packed.batch)
    outputs = [output for group in groups for output in group.outputs]
    for output, (row, begin, end) in zip(outputs, packed.places, strict=True):
        assert np.abs(logp_BT[row, begin:end] - output.logprobs).max() < 1e-4


@pytest.mark.slow
def test_weights_are_rounded_as_a_training_step_rounds_them():
    """bfloat16 where it multiplies in bfloat16, FP8's values where it has these; norms and routers
    as they are.
    """
    cfg = replace(CFG, quant=QuantConfig("fp8"), train=replace(CFG.train, dtype="bfloat16"))
    graphdef, state = state_of()
    found = compiled(partial(handed_over, cfg, graphdef))(state)
    master = nnx.merge(graphdef, *state[:2])
    block, whole = found.layers[1].block, master.moe_layers
    assert block.ffn_norm_D.dtype == block.moe.router.w_DE.dtype == np.float32
    assert np.array_equal(block.moe.router.w_DE[...], whole.moe.router.w_DE[0])
    assert found.rest.head_DV.dtype == block.mla.w_o_HU_D.dtype == jax.numpy.bfloat16
    assert np.array_equal(found.rest.head_DV[...], master.head_DV[...].astype("bfloat16"))
    down_EFD, exact_EFD = block.moe.w_down_EFD[...], whole.moe.w_down_EFD[0]
    assert len(np.unique(np.abs(np.asarray(down_EFD[0], np.float32)))) <= 127  # of E4M3
    np.testing.assert_allclose(np.asarray(down_EFD, np.float32), exact_EFD, rtol=0.07, atol=1e-3)


@pytest.mark.slow
def test_weights_of_a_mesh_are_gathered_from_its_devices(prompts, groups):
    cfg = replace(CFG, mesh=MeshConfig(data=2, node=2, local=2), train=replace(CFG.train, rows=8))
    sharding = make_sharding(cfg, abstract_state(cfg)[1].params)
    weights = sharding.on_one_device(random_state(cfg, sharding)._replace(optimizer=()))
    assert rollouts_of(prompts, cfg).groups(weights, [2, 0, 3], batch=7) == groups


@pytest.mark.slow
def test_weights_of_a_pipeline_are_gathered_from_its_stages(prompts, groups):
    cfg = replace(
        CFG,
        mesh=MeshConfig(pipe=2, local=2),
        pipeline=PipelineConfig("1f1b", "E+1|1+H+M"),
        train=replace(CFG.train, rows=8, microbatches=2),
    )
    run = PipelineRun(cfg)
    weights = run.on_one_device(from_whole(run.layout, random_state(cfg)))
    assert rollouts_of(prompts, cfg).groups(weights, [2, 0, 3], batch=7) == groups
