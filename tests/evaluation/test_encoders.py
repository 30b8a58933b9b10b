import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_perfusion.evaluation import ClipEncoder, IdentityEncoder


@pytest.fixture(params=["dinov2", "vit"])
def identity_folder(request, identity_folders):
    return identity_folders[request.param]


@pytest.fixture
def clip(clip_folder):
    return ClipEncoder.from_pretrained(str(clip_folder))


@pytest.fixture
def images():
    """More than two batches of noise, of different shapes and modes."""
    random = np.random.default_rng(0)
    sizes = [(16, 16), (24, 16), (20, 28)]
    made = [Image.fromarray(random.integers(0, 256, (*sizes[n % 3], 3), dtype=np.uint8)) for n in range(130)]
    return [made[0].convert("L"), made[1].convert("RGBA"), *made[2:]]


def test_rows_are_unit_vectors_in_float32(clip, identity_folder, images):
    identity = IdentityEncoder.from_pretrained(str(identity_folder))
    for rows, width in (
        (clip.encode_images(images), 24),
        (clip.encode_texts(["a cat", "a dog on the beach"]), 24),
        (identity.encode_images(images), 32),
    ):
        assert rows.shape[1] == width and rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))


def test_an_image_is_encoded_alike_in_any_batch(clip, identity_folder, images):
    identity = IdentityEncoder.from_pretrained(str(identity_folder))
    for encoder in (clip, identity):
        together = encoder.encode_images(images)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
        shuffled = encoder.encode_images([images[n] for n in order])
        torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.encode_images(images[99:100]), together[99:100], atol=1e-5, rtol=0)


def test_a_text_is_encoded_alike_in_any_batch(clip):
    texts = ["a cat", "a photo of the teddy bear on the beach", "a dog"]
    together = clip.encode_texts(texts)
    for n, text in enumerate(texts):
        torch.testing.assert_close(clip.encode_texts([text]), together[n : n + 1], atol=1e-5, rtol=0)


def test_embeddings_are_those_of_the_models_own_forward(clip, images):
    texts = ["a cat", "a dog on the beach"]
    tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = clip.image_processor(images=images[2:4], return_tensors="pt").pixel_values
    output = clip.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    torch.testing.assert_close(clip.encode_texts(texts), output.text_embeds)
    torch.testing.assert_close(clip.encode_images(images[2:4]), output.image_embeds)


def test_identity_is_the_cls_embedding(identity_folder, images):
    identity = IdentityEncoder.from_pretrained(str(identity_folder))
    pixels = identity.image_processor(images=images[2:5], return_tensors="pt").pixel_values
    cls = identity.model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(
        identity.encode_images(images[2:5]), torch.nn.functional.normalize(cls, dim=-1), atol=1e-5, rtol=0
    )


def test_a_text_that_is_too_long_is_cut(clip):
    long = "a cat on the beach " * 20
    torch.testing.assert_close(clip.encode_texts([long]), clip.encode_texts([long + "a dog"]))


def test_nothing_to_encode_is_an_error(clip):
    with pytest.raises(ValueError, match="at least one"):
        clip.encode_images([])
    with pytest.raises(ValueError, match="at least one"):
        clip.encode_texts([])


def test_no_graph_is_kept(clip, images):
    assert not clip.encode_images(images[:2]).requires_grad
    assert not clip.encode_texts(["a cat"]).requires_grad
