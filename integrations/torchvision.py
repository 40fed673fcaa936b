"""
torchvision: `forward` of its models; of detectors also the parts `preprocess`, `rpn`, `roi_heads` and `postprocess`.

Run against torchvision 0.29.2 on the CPU, with a stand-in for its compiled `nms`. The table names its model classes,
however their models are made; subclasses with their own `forward` are included. For the modules inside the other
models, see `gpuscope.integrations.modules`. A model that the program compiles as a whole has no stage.
"""

from __future__ import annotations

from gpuscope.instrument import Target

MODULE = "torchvision.models"
_NAME = {"model": "self.__class__.__name__"}
_OF_IMAGES = (
    "alexnet:AlexNet",
    "convnext:ConvNeXt",
    "densenet:DenseNet",
    "efficientnet:EfficientNet",
    "googlenet:GoogLeNet",
    "inception:Inception3",
    "maxvit:MaxVit",
    "mnasnet:MNASNet",
    "mobilenetv2:MobileNetV2",
    "mobilenetv3:MobileNetV3",
    "regnet:RegNet",
    "resnet:ResNet",
    "shufflenetv2:ShuffleNetV2",
    "squeezenet:SqueezeNet",
    "swin_transformer:SwinTransformer",
    "vgg:VGG",
    "vision_transformer:VisionTransformer",
    "segmentation._utils:_SimpleSegmentationModel",
    "video.mvit:MViT",
    "video.resnet:VideoResNet",
    "video.s3d:S3D",
    "video.swin_transformer:SwinTransformer3d",
)
_OF_LISTS_OF_IMAGES = (
    "detection.fcos:FCOS",
    "detection.generalized_rcnn:GeneralizedRCNN",
    "detection.retinanet:RetinaNet",
    "detection.ssd:SSD",
)
_OTHERS = {"segmentation.lraspp:LRASPP": "input.shape[0]", "optical_flow.raft:RAFT": "image1.shape[0]"}
_PARTS = {
    "preprocess": "detection.transform:GeneralizedRCNNTransform.forward",
    "rpn": "detection.rpn:RegionProposalNetwork.forward",
    "roi_heads": "detection.roi_heads:RoIHeads.forward",
    "postprocess": "detection.transform:GeneralizedRCNNTransform.postprocess",
}


def _forward(model: str, batch_size: str) -> Target:
    attributes = {**_NAME, "batch_size": batch_size}
    return Target("forward", f"{MODULE}.{model}.forward", attributes, subclasses=True, optional=True)


TARGETS = (
    *(_forward(model, "x.shape[0]") for model in _OF_IMAGES),
    *(_forward(model, "len(images)") for model in _OF_LISTS_OF_IMAGES),
    *(_forward(model, batch_size) for model, batch_size in _OTHERS.items()),
    *(Target(stage, f"{MODULE}.{path}", subclasses=True, optional=True) for stage, path in _PARTS.items()),
)
