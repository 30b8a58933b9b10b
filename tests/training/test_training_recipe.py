"""What counts of the files of a training is their content, wherever they are."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from diffusers_perfusion.training import TrainingConfig
from diffusers_perfusion.training.images import read_images
from diffusers_perfusion.training.masks import masks_without_base_model
from diffusers_perfusion.training.training_recipe import training_recipe


@pytest.fixture
def recipe(family, training_settings):
    """The recipe of a training on the tiny pipeline with some settings changed."""

    def of(dtype=torch.float32, **settings):
        config = TrainingConfig(**training_settings | settings)
        images = read_images(config.instance_data_dir, 16, seed=config.seed)
        masks, source = masks_without_base_model(config.mask, images, config.instance_data_dir, config.superclass)
        found = training_recipe(config, family, dtype, images, [image.caption for image in images], masks, source)
        assert json.loads(json.dumps(found)) == found
        return found

    return of


def changed(one, other):
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def white(folder):
    """Write a mask for each image."""
    folder.mkdir()
    for name in ("1.png", "2.png", "3.png"):
        Image.new("L", (16, 16), 255).save(folder / name)
    return folder


def test_places_do_not_count(recipe, images_folder, tmp_path, monkeypatch):
    white(images_folder / "masks")
    vector = tmp_path / "vector.safetensors"
    save_file({"emb_params": torch.ones(32)}, vector)
    first = recipe(mask="auto", initial_embedding=str(vector))
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    shutil.copytree(images_folder / "masks", tmp_path / "my masks")
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = {"instance_data_dir": "images/", "covariance": "captions.txt", "initial_embedding": "./vector.safetensors"}
    assert recipe(mask=str(tmp_path / "my masks"), output_dir="here", **moved) == first
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (0, 0))
    assert recipe(mask="auto", **moved) == first


def test_settings_count(recipe):
    assert changed(recipe(), recipe(superclass="dog")) == {"superclass"}
    assert changed(recipe(mask="none"), recipe(mask="attention")) == {"mask"}
    assert recipe(mask="attention") == recipe(mask="auto")


def test_images_count(recipe, images_folder):
    first = recipe()
    with Image.open(images_folder / "1.png") as file:
        image = file.convert("RGB")
    image.save(images_folder / "1.png", compress_level=0)
    assert recipe() == first
    image.putpixel((3, 3), (1, 2, 3))
    image.save(images_folder / "1.png")
    second = recipe()
    assert changed(second, first) == {"images"}
    (images_folder / "3.png").rename(images_folder / "0.png")
    assert "images" in changed(recipe(), second)


def test_captions_count(recipe, images_folder):
    first = recipe()
    (images_folder / "2.txt").write_text("a cat on the beach")
    second = recipe()
    assert changed(second, first) == {"captions"}
    (images_folder / "2.txt").rename(images_folder / "1.txt")
    assert changed(recipe(), second) == {"captions"}


def test_masks_count(recipe, images_folder):
    folder = white(images_folder / "masks")
    first = recipe(mask="auto")
    grey = Image.new("L", (16, 16), 254)
    grey.putpixel((0, 0), 255)
    grey.save(folder / "2.png")
    assert changed(recipe(mask="auto"), first) == {"mask"}


def test_alpha_channels_count(recipe, images_folder):
    def draw(left):
        for path in images_folder.glob("*.png"):
            image = Image.new("RGBA", (16, 16), (128, 128, 128, 255))
            image.paste((128, 128, 128, 0), (0, 0, left, 16))
            image.save(path)
        return recipe(mask="auto")

    assert changed(draw(5), draw(6)) == {"mask"}
    assert recipe(mask="alpha") == recipe(mask="auto")


def test_the_covariance_and_the_initial_embedding_count(recipe, tmp_path):
    first = recipe()
    np.save(tmp_path / "c.npy", np.eye(32))
    assert changed(recipe(covariance=str(tmp_path / "c.npy")), first) == {"covariance"}
    assert changed(recipe(covariance=None), first) == {"covariance"}
    save_file({"emb_params": torch.ones(32)}, tmp_path / "vector.safetensors")
    started = recipe(initial_embedding=str(tmp_path / "vector.safetensors"))
    assert changed(started, first) == {"initial_embedding"}
    save_file({"emb_params": torch.zeros(32)}, tmp_path / "vector.safetensors")
    assert changed(recipe(initial_embedding=str(tmp_path / "vector.safetensors")), started) == {"initial_embedding"}


def test_the_base_model_counts_in_the_precision_that_it_is_trained_in(recipe, family):
    first, half = recipe(), recipe(torch.bfloat16)
    assert changed(first, half) == {"weights"}
    family.model.to(torch.bfloat16)
    assert recipe(torch.bfloat16) == half
    layer = next(iter(family.layers.values()))
    layer.to_v.weight.data[0, 0] += 1
    assert changed(recipe(torch.bfloat16), half) == {"weights"}
    assert changed(recipe(pretrained_model_name_or_path="other"), recipe()) == {"base_model"}


def test_quantised_weights_count(recipe, family):
    full = recipe()
    quantize_(family.model, Int8WeightOnlyConfig())
    first = recipe()
    assert changed(first, full) == {"weights"}
    assert recipe() == first
    layer = next(iter(family.layers.values()))
    layer.to_v.weight.qdata[0, 0] += 1
    assert changed(recipe(), first) == {"weights"}
