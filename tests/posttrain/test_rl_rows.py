"""Groups as rows: every token of every answer, in its place and nowhere else."""

import numpy as np
import pytest

from dsv3_jax.posttrain.rl_prompts import PromptSet, RLPrompt
from dsv3_jax.posttrain.rl_rows import pack, rows_needed
from dsv3_jax.posttrain.rollouts import Group, Output

EOS = 1


def random_groups(seed: int, longest_answer: int = 9) -> tuple[PromptSet, list[Group]]:
    """4 groups of 3 answers; no token of a prompt is one of an answer's."""
    rng = np.random.default_rng(seed)
    tokens = tuple(tuple(rng.integers(10, 50, rng.integers(1, 8)).tolist()) for _ in range(5))
    prompts = PromptSet((RLPrompt("1", "f line 1", "p", []),) * 5, tokens, 0, "")

    def output() -> Output:
        count = int(rng.integers(1, longest_answer))
        return Output(rng.integers(50, 99, count).tolist(), [-1.0] * count, True, "")

    return prompts, [Group(int(rng.integers(5)), [output() for _ in range(3)]) for _ in range(4)]


@pytest.mark.parametrize("seed", range(4))
def test_every_sample_stands_whole_in_a_segment_of_its_own(seed: int):
    prompts, groups = random_groups(seed)
    packed = pack(prompts, groups, length=24, rows=12, eos_id=EOS)
    batch, outputs = packed.batch, [(g.prompt, one) for g in groups for one in g.outputs]
    assert len(packed.places) == len(outputs)
    left_BT = np.ones(batch.labels_BT.shape, bool)
    seen = set()
    for (prompt, output), (row, begin, end) in zip(outputs, packed.places, strict=True):
        text = [*prompts.tokens[prompt], *output.tokens]
        start = end - len(text) + 1
        assert end - begin == len(output.tokens)
        assert batch.tokens_BT[row, start:end].tolist() == text[:-1]
        assert batch.labels_BT[row, begin:end].tolist() == output.tokens
        assert (batch.labels_BT[row, start:begin] == -1).all()
        (segment,) = set(batch.segments_BT[row, start:end].tolist())
        assert (batch.segments_BT[row] == segment).sum() == end - start, "shared with another"
        assert (row, segment) not in seen
        assert left_BT[row, start:end].all(), "written twice"
        seen.add((row, segment))
        left_BT[row, start:end] = False
    assert (batch.tokens_BT[left_BT] == EOS).all()
    assert (batch.labels_BT[left_BT] == -1).all()
    assert {x.dtype for x in batch[:3]} == {np.dtype(np.int32)}


def test_so_many_rows_always_do_and_fewer_do_not():
    """6 answers of at most 9 places in rows of 20: the worst is that all are longest."""
    assert rows_needed(6, 9, 20) == 3
    assert rows_needed(7, 9, 20) == 4
    assert rows_needed(7, 20, 20) == 7
    prompts, groups = random_groups(0)
    groups = [Group(g.prompt, [Output([9] * 4, [0.0] * 4, False, "")] * 3) for g in groups]
    longest = max(len(prompts.tokens[group.prompt]) + 3 for group in groups)
    needed = rows_needed(12, longest, longest)
    assert needed == 12
    pack(prompts, groups, longest, needed, EOS)
    with pytest.raises(ValueError, match="12 answers take 12 rows; allowed: 11"):
        pack(prompts, groups, longest, needed - 1, EOS)


@pytest.mark.parametrize("seed", range(20))
def test_random_answers_fit_into_the_rows_that_the_longest_need(seed: int):
    prompts, groups = random_groups(seed, longest_answer=12)
    longest = max(map(len, prompts.tokens)) + 11 - 1
    length = longest + seed
    rows = rows_needed(12, longest, length)
    assert pack(prompts, groups, length, rows, EOS).batch.tokens_BT.shape == (rows, length)
