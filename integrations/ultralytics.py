"""
Ultralytics predictors: `predict`, with `preprocess`, `inference` and `postprocess` per batch.

Run against ultralytics 8.4.190. `predict` is timed each time that the predictor's generator is resumed: the first time
per batch includes the batch's work, the other times only hand out results.
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
