"""A small random model that is asked, for tests of what is asked and told."""

from dsv3_jax.checkpoint.model_folder import OpenedModel
from dsv3_jax.config import ModelConfig
from dsv3_jax.evaluate.subject import Subject
from dsv3_jax.inference.opening import Opened
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from tests.server.scripted import END, TOKENIZER, VOCAB
from tests.shapes import random_model, tiny_model

CFG: ModelConfig = tiny_model(
    vocab_size=VOCAB, num_layers=1, num_dense_layers=0, mtp_depth=0, max_length=16
)


def make_subject() -> tuple[DeepSeekV3, Subject]:
    """The model in float32, and what asks it; a byte a token."""
    model = random_model(CFG)
    folder = OpenedModel(None, TOKENIZER, CFG, None, frozenset([END]))
    options = EngineOptions(rows=1, page_slots=16, pages=1)
    return model, Subject(Opened(lay_out(model), None, folder), options, rows=3)
