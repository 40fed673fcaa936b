"""
sentence-transformers: `encode` and `predict`, with `tokenize` and `forward` per batch.

Run against sentence-transformers 6.2.0, whose modules have had these names since 5.4. `forward` contains one stage per
module: `transformer`, `pooling`, `dense`, `normalize`. What `encode` does after it (copying to the host, which waits
for the GPU) is the rest of `encode`. A model that was compiled by `model.compile()` has no `forward`. An `encode` has
OpenTelemetry's attributes for `embeddings`, but no number of tokens: shapes do not tell it.
"""

from __future__ import annotations

from gpuscope.instrument import Target

MODULE = "sentence_transformers.base.model"
_PACKAGE = "sentence_transformers"
_MODULES = f"{_PACKAGE}.base.modules"
_BATCH = {"batch_size": "len(inputs)"}
_ENCODE = {
    "gen_ai.operation.name": "'embeddings'",
    "gen_ai.provider.name": "'sentence_transformers'",
    "gen_ai.request.model": "self.transformers_model.name_or_path",
}
TARGETS = (
    Target("encode", f"{_PACKAGE}.sentence_transformer.model:SentenceTransformer.encode", _ENCODE, subclasses=True),
    Target("encode", f"{_PACKAGE}.sparse_encoder.model:SparseEncoder.encode", _ENCODE, subclasses=True),
    Target("encode", f"{_PACKAGE}.multi_vector_encoder.model:MultiVectorEncoder.encode", _ENCODE, subclasses=True),
    Target("predict", f"{_PACKAGE}.cross_encoder.model:CrossEncoder.predict", subclasses=True),
    Target("tokenize", f"{_PACKAGE}.base.model:BaseModel.preprocess", _BATCH, subclasses=True),
    Target("forward", f"{_PACKAGE}.base.model:BaseModel.forward", {"device": "self.device"}, subclasses=True),
    Target("transformer", f"{_MODULES}.transformer:Transformer.forward", {"model": "self.model.name_or_path"}),
    Target("pooling", f"{_PACKAGE}.sentence_transformer.modules.pooling:Pooling.forward"),
    Target("dense", f"{_MODULES}.dense:Dense.forward"),
    Target("normalize", f"{_MODULES}.normalize:Normalize.forward"),
)
