"""What is wrong with a body is found in the time that it takes to read it, however long it is."""

import json

import pytest
from pydantic import ValidationError

from dsv3_jax.server.errors import Refusal
from dsv3_jax.server.protocol import ChatRequest, CompletionRequest, parse
from dsv3_jax.server.tokenizing import DetokenizeRequest

MANY, FEW = 3000, 150
FIELDS = {f"u{i}": 1 for i in range(MANY)}


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (CompletionRequest, {"prompt": [-1] * MANY}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": [*[1] * MANY, 2**31]}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": [*[1] * MANY, True]}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": [*[1] * MANY, [1]]}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": [["a"] * MANY]}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": ["x", ["a"] * MANY]}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": ["x", [[]] * MANY]}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": [[1]] * MANY}, "prompt: allowed: text"),
        (CompletionRequest, {"prompt": "a", "stop": [1] * MANY}, "stop: allowed: text"),
        (CompletionRequest, {"prompt": "a"} | FIELDS, "u0: unknown or unserved field"),
        (ChatRequest, {"messages": [1] * MANY}, "messages"),
        (ChatRequest, {"messages": [FIELDS]}, "messages.0: u0: unknown or unserved field"),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}, "allowed: text"),
        (DetokenizeRequest, {"tokens": [-1] * MANY}, "tokens: allowed: token ids"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_of_many_faults_few_are_noted(kind, body, said):
    """Each of 1 300 000, which fill 4 MB, would take 20 s to note and some minutes to tell."""
    sent = json.dumps(body).encode()
    with pytest.raises(ValidationError) as noted:
        kind.model_validate_json(sent)
    assert noted.value.error_count() < FEW
    with pytest.raises(Refusal) as refused:
        parse(kind, sent)
    assert said in refused.value.message
    assert len(refused.value.message) < 1000


@pytest.mark.parametrize(
    "prompt", ["a", [1], [0, 2**31 - 1], ["a", "b"], [[1], [2, 3]], [5] * MANY, [[5] * MANY]]
)
def test_every_kind_of_prompt_passes_as_it_is(prompt):
    assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompt
    assert parse(DetokenizeRequest, b'{"tokens": []}').tokens == []
