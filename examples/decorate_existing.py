"""
An existing inference script, with its stages made visible.

All that was added is `import gpuscope`, the lines with `@gpuscope.stage` or `gpuscope.stage(`, and the last two prints.

    GPUSCOPE=1 GPUSCOPE_EXPORTER=file python examples/decorate_existing.py
"""

import torch
from torch import nn

import gpuscope


class Classifier:
    """A convolutional network that tells one of ten kinds of image, and what surrounds it."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        self.network.eval().to(device)

    @gpuscope.stage("preprocess")
    def preprocess(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Return normalised images as one batch."""
        batch = torch.stack(images).float() / 255
        return (batch - batch.mean((2, 3), keepdim=True)) / batch.std((2, 3), keepdim=True)

    @gpuscope.stage("infer", attributes={"model": "small-cnn"})
    def infer(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a score for each kind."""
        return self.network(batch)

    @staticmethod
    @gpuscope.stage("postprocess")
    def postprocess(logits: torch.Tensor) -> list[int]:
        """Return the likeliest kind of each image."""
        return logits.argmax(-1).tolist()

    @gpuscope.stage("classify")
    def classify(self, images: list[torch.Tensor]) -> list[int]:
        """Answer one request."""
        batch = self.preprocess(images)
        with gpuscope.stage("to device") as stage:
            stage.set_attribute("bytes", batch.nbytes)
            batch = batch.to(self.device)
        return self.postprocess(self.infer(batch))


@torch.inference_mode()
def main() -> None:
    classifier = Classifier("cuda" if torch.cuda.is_available() else "cpu")
    images = [torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8) for _ in range(8)]
    for _ in range(30):
        kinds = classifier.classify(images)
    print("Kinds in the last batch:", kinds)

    gpuscope.flush(5)
    print(f"\n{gpuscope.summary()}")
    print(f"\n{gpuscope.statistics()}")


if __name__ == "__main__":
    main()
