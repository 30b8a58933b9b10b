import pytest
import torch
from conftest import make_vae
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training.training_data import make_training_data


@pytest.fixture
def family(pipeline):
    return family_of(pipeline)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [AutoencoderTiny, AutoencoderKL])
def test_images_are_encoded_as_they_are_and_mirrored(family, images, kind):
    vae = make_vae(kind)
    data = make_training_data(family, vae, images, None, random_flip=True)
    torch.testing.assert_close(data.latents, family.encode_latents(vae, torch.cat([images, images.flip(-1)])))
    assert not torch.allclose(data.latents[3:], data.latents[:3].flip(-1), atol=1e-3)
    assert not data.latents.requires_grad
    torch.testing.assert_close(
        make_training_data(family, vae, images, None, random_flip=False).latents, data.latents[:3]
    )


def test_without_masks_everything_counts(family, images):
    assert torch.equal(
        make_training_data(family, make_vae(), images, None, random_flip=True).masks, torch.ones(6, 1, 8, 8)
    )


@pytest.mark.parametrize("size", [4, 8, 16, 24])
def test_masks_are_mirrored_scaled_and_peak_at_one(family, images, size):
    masks = torch.zeros(3, 1, size, size)
    for number, value in enumerate((0.25, 0.5, 1)):
        masks[number, :, : size // 2, : size // 4] = value
    found = make_training_data(family, make_vae(), images, masks, random_flip=True).masks
    expected = torch.zeros(6, 1, 8, 8)
    expected[:3, :, :4, :2] = 1
    expected[3:, :, :4, 6:] = 1
    torch.testing.assert_close(found, expected)


def test_masks_are_averaged_over_what_a_latent_covers(family, images):
    masks = torch.zeros(3, 1, 16, 16)
    masks[:, :, 2:, 2:] = 1
    masks[:, :, 1, 2] = 1  # one of the four pixels of a latent
    found = make_training_data(family, make_vae(), images, masks, random_flip=False).masks
    assert found[0, 0, 0, 1] == 0.25
    assert found[0, 0, 0, 2] == 0
    assert found[0, 0, 1, 1] == 1


def test_masks_reach_a_sixteenth_of_the_side_beyond_the_data(family, images):
    images = torch.nn.functional.interpolate(images, 64)
    masks = torch.zeros(3, 1, 64, 64)
    masks[:, :, 20:30, 24:36] = 1
    found = make_training_data(family, make_vae(), images, masks, random_flip=False).masks
    expected = torch.zeros(3, 1, 32, 32)
    expected[:, :, 8:17, 10:20] = 1  # what the data covers, and two latents more on each side
    torch.testing.assert_close(found, expected)


def test_latents_of_a_tiny_autoencoder(family):
    vae = make_vae(AutoencoderTiny)
    vae.register_to_config(scaling_factor=0.5)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(family.encode_latents(vae, images), 0.5 * vae.encode(images * 2 - 1).latents)


def test_latents_of_a_variational_autoencoder_are_the_mode(family):
    vae = make_vae(AutoencoderKL)
    vae.register_to_config(shift_factor=0.1)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mean = vae.encode(images * 2 - 1).latent_dist.mean
    latents = family.encode_latents(vae, images)
    torch.testing.assert_close(latents, (mean - 0.1) * vae.config.scaling_factor)
    assert vae.config.scaling_factor != 1
    assert torch.equal(latents, family.encode_latents(vae, images))
    assert family.encode_latents(vae.to(torch.bfloat16), images).dtype == torch.float32


def test_mirror_images_have_the_captions_of_their_images(family, images):
    images = images[:2]
    for flip, expected in ((True, ("a", None, "a", None)), (False, ("a", None))):
        assert make_training_data(family, make_vae(), images, None, flip, ["a", None]).prompts == expected
    assert make_training_data(family, make_vae(), images, None, True).prompts == (None,) * 4
