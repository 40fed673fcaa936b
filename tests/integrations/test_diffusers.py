"""diffusers, the real package: a small pipeline with random weights."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # noqa: E402

from .models_diffusers import CALL, ddim, stable_diffusion  # noqa: E402
from .models_recorded import attributes, paths, recorded, without_compilations  # noqa: E402

STEPS = ["pipeline/denoise"] * 3
MADE = ["pipeline", "pipeline/text_encoder", *STEPS, "pipeline/vae_decode"]


def run(pipe, **options) -> np.ndarray:
    """Return the image of a fixed seed."""
    return pipe(**{**CALL, **options}, generator=torch.Generator().manual_seed(1)).images


def test_text_encoder_steps_and_decoder():
    """A call has the text encoder, one `denoise` a step, and the VAE; the image is the same."""
    plain = run(stable_diffusion())
    with recorded("diffusers") as spans:
        image = run(stable_diffusion())
    assert np.array_equal(image, plain)
    assert paths(spans) == MADE
    assert attributes(spans, "denoise") == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert attributes(spans, "pipeline") == [
        {
            "pipeline": "StableDiffusionPipeline",
            "num_inference_steps": 3,
            "height": 16,
            "width": 16,
            "num_images_per_prompt": 1,
        }
    ]


def test_steps_with_the_bar_shown(capsys):
    """With the progress bar shown it shows what it does, and the steps are the same."""
    with recorded("diffusers") as spans:
        pipe = stable_diffusion()
        pipe.set_progress_bar_config(disable=False)
        run(pipe)
    assert "3/3" in capsys.readouterr().err
    assert paths(spans) == MADE


def test_steps_of_a_compiled_denoiser():
    """A denoiser that the program has compiled changes nothing about the steps, and says what they waited for."""
    with recorded("diffusers") as spans:
        pipe = ddim()
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        pipe(num_inference_steps=3, output_type="np")
    assert without_compilations(paths(spans)) == ["pipeline", *STEPS]
    assert "pipeline/denoise/torch.compile" in paths(spans)


def test_an_image_goes_through_the_encoder():
    """From an image to an image, the VAE's encoder is a stage too."""
    with recorded("diffusers") as spans:
        pipe = stable_diffusion(StableDiffusionImg2ImgPipeline)
        image = torch.zeros(1, 3, 16, 16)
        pipe(image=image, prompt="a cat", num_inference_steps=4, strength=0.5, output_type="np")
    assert paths(spans) == [
        "pipeline",
        "pipeline/text_encoder",
        "pipeline/vae_encode",
        *["pipeline/denoise"] * 2,
        "pipeline/vae_decode",
    ]


def test_a_pipeline_that_iterates_over_its_bar():
    """Where the bar is what the pipeline iterates over, each item is a step."""
    with recorded("diffusers") as spans:
        ddim()(num_inference_steps=3, output_type="np")
    assert paths(spans) == ["pipeline", *STEPS]
    assert attributes(spans, "denoise") == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_an_error_in_a_step_ends_it():
    """A step that fails is the last, and the next call is as if nothing had been."""

    def fail(*_):
        raise RuntimeError("no more noise")

    with recorded("diffusers") as spans:
        pipe = stable_diffusion()
        with pytest.raises(RuntimeError, match="no more noise"):
            run(pipe, callback_on_step_end=fail)
        run(pipe)
    failed = [(span.name, span.status) for span in spans if span.status == "ERROR"]
    assert failed == [("pipeline", "ERROR"), ("denoise", "ERROR")]
    assert paths(spans)[3:] == MADE


def test_uninstrument_restores_what_was():
    """Afterwards the classes have what they had, and nothing more, and the pipeline made meanwhile works."""
    owners = (DiffusionPipeline, StableDiffusionPipeline, AutoencoderKL)
    before = [dict(vars(owner)) for owner in owners]
    with recorded("diffusers"):
        pipe = stable_diffusion()
        assert all(dict(vars(owner)) != known for owner, known in zip(owners, before, strict=True))
    assert [dict(vars(owner)) for owner in owners] == before
    assert run(pipe).shape == (1, 16, 16, 3)
