"""A service around a small random model, for tests of the whole."""

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.server.app import Service
from dsv3_jax.server.engine_thread import EngineThread
from dsv3_jax.server.generating import Limits
from dsv3_jax.server.jobs import Jobs
from dsv3_jax.server.keys import Keys
from tests.server.scripted import END, TOKENIZER, VOCAB
from tests.shapes import random_model, tiny_model

MODEL = tiny_model(vocab_size=VOCAB, num_layers=1, num_dense_layers=0, mtp_depth=1, max_length=64)


def model_and_service(drafts: int, queue: int) -> tuple[DeepSeekV3, Service]:
    """Four rows, whose longest texts fill more pages than there are; called `model`."""
    model = random_model(MODEL)
    settings = EngineConfig(
        rows=4,
        page_slots=4,
        pages=40,
        chunk=16,
        drafts=drafts,
        top_logprobs=2,
        prompt_logprobs=True,
    )
    engine = Engine(lay_out(model, drafts=drafts), settings)
    template = ChatTemplate(TOKENIZER)
    end_ids, most = frozenset([END]), engine.room - 1
    jobs = Jobs("model", TOKENIZER, template, TOKENIZER.bos_id, end_ids, engine.room, most)
    return model, Service(EngineThread(engine, queue), jobs, Keys(), Limits(100_000, 300.0))
