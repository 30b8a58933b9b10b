import pytest
import torch
from conftest import make_vae
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_perfusion.pictures import encode_latents
from diffusers_perfusion.training.data import make_subject


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [AutoencoderTiny, AutoencoderKL])
def test_pictures_are_encoded_as_they_are_and_mirrored(images, kind):
    vae = make_vae(kind)
    subject = make_subject(vae, images, None, flip=True)
    torch.testing.assert_close(subject.latents, encode_latents(vae, torch.cat([images, images.flip(-1)])))
    assert not torch.allclose(subject.latents[3:], subject.latents[:3].flip(-1), atol=1e-3)
    assert not subject.latents.requires_grad
    torch.testing.assert_close(make_subject(vae, images, None, flip=False).latents, subject.latents[:3])


def test_without_masks_everything_counts(images):
    assert torch.equal(make_subject(make_vae(), images, None, flip=True).masks, torch.ones(6, 1, 8, 8))


@pytest.mark.parametrize("size", [4, 8, 16, 24])
def test_masks_are_mirrored_scaled_and_peak_at_one(images, size):
    masks = torch.zeros(3, 1, size, size)
    for number, value in enumerate((0.25, 0.5, 1)):
        masks[number, :, : size // 2, : size // 4] = value
    found = make_subject(make_vae(), images, masks, flip=True).masks
    expected = torch.zeros(6, 1, 8, 8)
    expected[:3, :, :4, :2] = 1
    expected[3:, :, :4, 6:] = 1
    torch.testing.assert_close(found, expected)


def test_masks_are_averaged_over_what_a_latent_covers(images):
    masks = torch.zeros(3, 1, 16, 16)
    masks[:, :, 2:, 2:] = 1
    masks[:, :, 1, 2] = 1  # one of the four pixels of a latent
    found = make_subject(make_vae(), images, masks, flip=False).masks
    assert found[0, 0, 0, 1] == 0.25
    assert found[0, 0, 0, 2] == 0
    assert found[0, 0, 1, 1] == 1


def test_masks_reach_a_sixteenth_of_the_side_beyond_the_subject(images):
    images = torch.nn.functional.interpolate(images, 64)
    masks = torch.zeros(3, 1, 64, 64)
    masks[:, :, 20:30, 24:36] = 1
    found = make_subject(make_vae(), images, masks, flip=False).masks
    expected = torch.zeros(3, 1, 32, 32)
    expected[:, :, 8:17, 10:20] = 1  # what the subject covers, and two latents more on each side
    torch.testing.assert_close(found, expected)
