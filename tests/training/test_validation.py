from dataclasses import replace
from functools import wraps

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from conftest import LENGTH, random_concept
from PIL import Image

from diffusers_perfusion.training import TrainingConfig, validation
from diffusers_perfusion.training.validation import validate

PROMPTS = ["a photo of a <my-cat>", "a <my-cat> on the beach"]


class Numbers(GeneralTracker):
    """A tracker that keeps the numbers it is given, and takes no images."""

    name = "numbers"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.numbers = []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **options):
        self.numbers.append((step, values))


class Album(Numbers):
    """One that keeps images too."""

    name = "album"

    def __init__(self):
        super().__init__()
        self.images = []

    def log_images(self, values, step=None, **options):
        self.images.append((step, values, options))


@pytest.fixture
def config(training_settings, monkeypatch):
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 2)
    return TrainingConfig(**training_settings, validation_prompt=PROMPTS, num_validation_images=3, seed=4)


@pytest.fixture
def run(pipeline, make_concept, config):
    """Validate a concept with some trackers."""

    def validate_with(*trackers):
        if not pipeline.list_perfusion():
            pipeline.load_perfusion(make_concept(bias=0.5), concept_name="concept")
        accelerator = Accelerator(log_with=list(trackers) or None)
        accelerator.init_trackers("test")
        return validate(pipeline, "concept", config, accelerator, 50)

    return validate_with


def test_a_sheet_with_a_row_for_each_prompt(run, pipeline, config):
    path = run()
    assert str(path) == f"{config.output_dir}/validation/step-000050.png"
    with Image.open(path) as file:
        sheet = np.asarray(file)
    assert sheet.shape == (2 * 16, 3 * 16, 3)
    with pipeline.set_perfusion("concept"):
        for row, prompt in enumerate(PROMPTS):
            images = pipeline(
                prompt,
                num_inference_steps=2,
                guidance_scale=6.0,
                num_images_per_prompt=3,
                generator=torch.Generator().manual_seed(4),
            ).images
            assert np.array_equal(sheet[16 * row : 16 * row + 16], np.concatenate([*map(np.asarray, images)], 1))
    assert not np.array_equal(sheet[:16, :16], sheet[:16, 16:32])
    assert np.array_equal(np.asarray(Image.open(run())), sheet)


@pytest.fixture
def calls(monkeypatch):
    """Return a pipeline's keyword arguments in each of its calls."""

    def watch(pipe):
        seen, call = [], type(pipe).__call__

        @wraps(call)
        def seeing(self, *args, **kwargs):
            seen.append(kwargs)
            return call(self, *args, **kwargs)

        monkeypatch.setattr(type(pipe), "__call__", seeing)
        return seen

    return watch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pipeline", {}),
        ("flux_pipeline", {"max_sequence_length": LENGTH}),
        ("sd3_pipeline", {"max_sequence_length": LENGTH}),
        ("klein_pipeline", {}),  # whose tokenizer allows more than the pipeline
    ],
)
@pytest.mark.parametrize("resolution", [None, 32])
def test_images_and_texts_are_as_large_as_in_training(request, config, calls, name, expected, resolution):
    pipe = request.getfixturevalue(name)
    pipe.load_perfusion(random_concept(pipe), concept_name="concept")
    seen = calls(pipe)
    images = validation.generate(pipe, "concept", replace(config, resolution=resolution), Accelerator())
    sizes = {} if resolution is None else {"height": 32, "width": 32}
    given = ("height", "width", "max_sequence_length")
    for arguments in seen:
        assert {key: value for key, value in arguments.items() if key in given} == expected | sizes
    assert len(seen) == len(PROMPTS)
    assert resolution is None or {image.size for row in images for image in row} == {(32, 32)}


def test_zeros_for_a_text_encoder_that_is_missing_are_as_many_as_ever(sd3_pipeline, config, calls):
    sd3_pipeline.text_encoder_3 = sd3_pipeline.tokenizer_3 = None
    sd3_pipeline.load_perfusion(random_concept(sd3_pipeline), concept_name="concept")
    seen = calls(sd3_pipeline)
    validate(sd3_pipeline, "concept", config, Accelerator(), 50)
    assert seen and all("max_sequence_length" not in arguments for arguments in seen)


@pytest.mark.parametrize(("name", "expected"), [("pipeline", 6.0), ("flux_pipeline", 3.5), ("chroma_pipeline", 5.0)])
def test_the_guidance_is_the_paper_s_or_in_joint_attention_the_pipeline_s_own(request, config, name, expected):
    pipe, seen = request.getfixturevalue(name), []
    pipe.load_perfusion(random_concept(pipe), concept_name="concept")

    def see(pipe, step, timestep, tensors):
        seen.append(pipe.guidance_scale)
        return tensors

    call = type(pipe).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(pipe), "__call__", lambda self, *args, **kwargs: call(self, *args, callback_on_step_end=see, **kwargs)
        )
        validate(pipe, "concept", config, Accelerator(), 50)
    assert set(seen) == {expected}


def test_a_full_disk_leaves_the_earlier_sheet(run, config, full_disk):
    path = run()
    before = path.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(OSError, match=f"File too large: '{path}'"):
        run()
    assert [file.read_bytes() for file in path.parent.iterdir()] == [before]


def test_it_generates_with_the_concept_s_settings_and_restores_those_from_before(run, pipeline, make_concept):
    expected = np.asarray(Image.open(run()))
    pipeline.set_perfusion("concept", bias=0.9, temperature=0.3)
    pipeline.load_perfusion(make_concept("<other>", seed=1), concept_name="other")
    assert np.array_equal(np.asarray(Image.open(run())), expected)
    assert pipeline.get_active_perfusion() == ["concept", "other"]
    assert float(pipeline.unet._perfusion.loaded["concept"].bias) == pytest.approx(0.9)


def test_trackers_get_the_images_if_they_take_any(run):
    album = Album()
    with Image.open(run(album, Numbers())) as file:
        sheet = np.asarray(file)
    assert [(step, list(values), options) for step, values, options in album.images] == [
        (50, [prompt], {}) for prompt in PROMPTS
    ]
    for row, (_, values, _) in enumerate(album.images):
        (images,) = values.values()
        assert images.shape == (3, 16, 16, 3)
        assert np.array_equal(np.concatenate([*images], 1), sheet[16 * row : 16 * row + 16])


def test_tensorboard_is_told_the_order_of_the_axes(run):
    album = Album()
    album.name = "tensorboard"
    run(album)
    assert [options for _, _, options in album.images] == [{"dataformats": "NHWC"}] * 2
