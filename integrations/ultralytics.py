"""
Ultralytics predictors: `predict`, with `preprocess`, `inference` and `postprocess` for each batch.

Run against ultralytics 8.4.190. `predict` is timed each time that the predictor's generator is resumed: the first of a
batch has the batch's work in it, the others hand out results.
"""

from __future__ import annotations

from gpuscope.instrument import Target

MODULE = "ultralytics.engine.predictor"
_BASE = f"{MODULE}:BasePredictor"
TARGETS = (
    Target("predict", f"{_BASE}.stream_inference", {"model": "self.args.model", "task": "self.args.task"}),
    Target("preprocess", f"{_BASE}.preprocess", subclasses=True),
    Target("inference", f"{_BASE}.inference", {"input_shape": "im.shape"}, subclasses=True),
    Target("postprocess", f"{_BASE}.postprocess", subclasses=True),
)
