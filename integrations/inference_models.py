"""
Roboflow `inference-models`: `infer`, with `pre_process`, `forward` and `post_process`, with any backend.

Run against inference-models 0.39.6.
"""

from __future__ import annotations

from gpuscope.instrument import Target

MODULE = "inference_models.models.base"
_STEPS = ("infer", "pre_process", "forward", "post_process")
_MODELS = (
    "classification:ClassificationModel",
    "classification:MultiLabelClassificationModel",
    "depth_estimation:DepthEstimationModel",
    "documents_parsing:StructuredOCRModel",
    "documents_parsing:TextOnlyOCRModel",
    "instance_segmentation:InstanceSegmentationModel",
    "keypoints_detection:KeyPointsDetectionModel",
    "object_detection:ObjectDetectionModel",
    "object_detection:OpenVocabularyObjectDetectionModel",
    "semantic_segmentation:SemanticSegmentationModel",
)
TARGETS = tuple(
    Target(step, f"{MODULE}.{model}.{step}", {"model": "self.__class__.__name__"}, subclasses=True)
    for model in _MODELS
    for step in _STEPS
)
