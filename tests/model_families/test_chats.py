"""Concepts in models whose text encoder reads the prompt in a chat, whose template stands around it."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CHAT_LENGTH, effect, random_concept
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, ZImageOmniPipeline

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.joint_attention import value_sites
from diffusers_perfusion.model_families import edited_model, family_of
from diffusers_perfusion.registry import registry_of
from diffusers_perfusion.training import TrainingConfig, train
from diffusers_perfusion.training.superclass import TEMPLATES, superclass_positions

PIPELINES = ("klein_pipeline", "dev_pipeline", "z_image_pipeline", "qwen_image_pipeline")


@pytest.fixture(params=PIPELINES)
def pipe(request):
    pipe = request.getfixturevalue(request.param)
    for model in (edited_model(pipe), *family_of(pipe).text_encoders):
        model.requires_grad_(False)
    return pipe


@pytest.fixture
def draw(pipe, generate):
    return partial(generate, pipe=pipe, height=16, width=16, max_sequence_length=CHAT_LENGTH)


@pytest.mark.parametrize(
    "prompt",
    ["{} on the beach", "a {} on the beach", "a {}", "the\n{}, a {}", "a photo {}" + " on the beach" * 7],
)
def test_a_closed_gate_gives_the_superclass_prompt(pipe, draw, concept, prompt):
    """Of two tokens, with a space before them and without, behind the line break of the template and another one.

    Also where it becomes longer than a multiple of 32, to which Z-Image pads text, and beside shorter and longer ones.
    """
    token, superclass = (prompt.format(*[word] * 2) for word in ("<my-bear>", "teddy bear"))
    others = ["a cat", "a cat" + " on the beach" * 9]
    plain, alone = draw([superclass, *others]), draw(superclass)
    pipe.load_perfusion(concept())
    assert effect(draw([token, *others])[0], plain[0]) > 1e-3
    pipe.set_perfusion(bias=2.0, temperature=0.01)
    torch.testing.assert_close(draw([token, *others]), plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(draw(token), alone)


def test_a_token_of_letters_is_no_part_of_a_word(pipe, draw, concept):
    plain = draw(["a teddy bear on the beach", "a sksy on the beach"])
    pipe.load_perfusion(concept("sks"))
    edited = draw(["a sks on the beach", "a sksy on the beach"])
    assert effect(edited[0], plain[0]) > 1e-3 and torch.equal(edited[1], plain[1])
    pipe.set_perfusion(bias=2.0, temperature=0.01)
    for prompt in ("a {} on the beach", "{} on the beach", "the\n{}"):
        assert torch.equal(draw(prompt.format("sks")), draw(prompt.format("teddy bear")))


def test_values_are_edited_at_the_last_token_of_the_superclass_alone(pipe, draw, concept):
    made, outputs = concept(), {}

    def record(name):
        return lambda module, args, output: outputs.setdefault(name, []).append((module.forward(*args), output))

    pipe.load_perfusion(made)
    family = family_of(pipe)
    sites = {name: value_sites(layer)[0] for name, layer in family.layers.items()}
    for name, site in sites.items():
        site.module.register_forward_hook(record(name))
    prompts = ["<my-bear> on the beach", "a cat"]
    draw(prompts, num_inference_steps=1, guidance_scale=1.0, max_sequence_length=512)
    tokenizer = family.tokenizers[0]
    bear = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(" bear"))[0]
    place = family.tokenize(["teddy bear on the beach"])[0][0].tolist().index(bear)
    gate = torch.sigmoid(torch.tensor((1 - made.bias) / made.temperature))
    assert outputs.keys() == sites.keys()
    for name, ((before, after),) in outputs.items():
        expected = torch.zeros_like(before)
        image = before.shape[1] - 32 if name.startswith("layers.") else 0  # of Z-Image, where it comes first
        expected[0, image + place, sites[name].start : sites[name].stop] = gate * made.target_outputs[name]
        torch.testing.assert_close(after - before, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("pipe", ["qwen_image_pipeline"], indirect=True)
def test_a_guidance_scale_is_the_one_that_the_pipeline_follows(pipe, draw):
    arguments = family_of(pipe).call_arguments(3.0)
    assert effect(draw("a cat", **arguments), draw("a cat", negative_prompt="")) > 1e-3


def test_a_token_that_falls_off_the_end_is_warned_of(pipe, draw, concept, caplog):
    pipe.load_perfusion(concept())
    with caplog.at_level(logging.WARNING):
        draw("a cat on the beach " * CHAT_LENGTH + "<my-bear>")
    assert "<my-bear> falls off the end of a prompt" in caplog.text


def test_a_text_encoder_may_be_called_for_something_else(pipe, concept):
    """With a text that is shorter than the beginning of a chat, and to write on."""
    pipe.load_perfusion(concept())
    family = family_of(pipe)
    (tokenizer,), (text_encoder,) = family.tokenizers, family.text_encoders
    ids = tokenizer("a <my-bear>", return_tensors="pt").input_ids
    text_encoder(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    written = text_encoder.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert written.shape[1] > ids.shape[1]


def test_values_alone_are_trained_to_an_effect(pipe, draw, training_settings):
    token, superclass = "<my-cat> on the beach", "teddy bear on the beach"
    plain = draw(superclass)
    settings = {"superclass": "teddy bear", "embedding_learning_rate": 0.0, "value_learning_rate": 1.0}
    config = TrainingConfig(**training_settings | settings | {"resolution": 16, "max_train_steps": 6})
    trained = train(pipe, config)
    assert all(output.abs().max() > 0.1 for output in trained.target_outputs.values())
    pipe.load_perfusion(Path(config.output_dir) / "perfusion.safetensors")
    assert torch.equal(draw(superclass), plain) and effect(draw(token), plain) > 1e-3
    pipe.set_perfusion(bias=2.0, temperature=0.01)
    assert torch.equal(draw(token), plain)


def test_values_alone_are_trained_with_superclass_prompts(pipe, training_settings, monkeypatch):
    """Whole ones, though they are longer than the prompts, and at their last tokens."""
    seen, kind = [], type(family_of(pipe))
    predict = kind.predict

    def record(self, model, noisy, timesteps, encoding, resolution):
        seen.extend(zip(encoding.hidden_states, registry_of(self.model).edit.gate[..., 0], strict=True))
        return predict(self, model, noisy, timesteps, encoding, resolution)

    monkeypatch.setattr(kind, "predict", record)
    settings = {"superclass": "teddy bear", "embedding_learning_rate": 0.0, "resolution": 16, "max_train_steps": 6}
    train(pipe, TrainingConfig(**training_settings | settings))
    family = family_of(pipe)
    ids = family.tokenize([template.format("teddy bear") for template in TEMPLATES])
    with torch.no_grad():
        encoding = family.encode(ids)
    places = superclass_positions(family.tokenizers[0], "teddy bear", ids[0])[:, -1].tolist()
    lengths = [ids[0].shape[1]] * len(places) if encoding.mask is None else encoding.mask.sum(1).tolist()
    found = set()
    for row, gate in seen:
        (number,) = [
            n
            for n, (text, end) in enumerate(zip(encoding.hidden_states, lengths, strict=True))
            if len(row) >= end and torch.allclose(row[:end], text[:end], atol=1e-4) and not row[end:].any()
        ]
        assert gate.nonzero()[:, 0].tolist() == [places[number]]
        found.add(number)
    assert len(seen) == 24 and len(found) > 3


def test_embeddings_of_others_are_marked(pipe, draw, concept, caplog):
    prompt = "a teddy bear on the beach"
    embeds = family_of(pipe).encode(family_of(pipe).tokenize([prompt])).hidden_states.detach()
    if family_of(pipe).text_argument == "cap_feats":
        embeds = list(embeds)
    pipe.load_perfusion(concept())
    expected = draw("a <my-bear> on the beach", guidance_scale=0.0, max_sequence_length=512)
    settings = {"prompt": None, "prompt_embeds": embeds, "guidance_scale": 0.0}
    with caplog.at_level(logging.WARNING):
        assert effect(draw("", **settings), expected) > 1e-3
    assert "does not recognise 1 of 1 prompt embeddings" in caplog.text
    tokenizer = family_of(pipe).tokenizers[0]
    bear = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(" bear"))[0]
    place = family_of(pipe).tokenize([prompt])[0][0].tolist().index(bear)
    pipe.mark_perfusion(embeds, {"my-bear": place})
    torch.testing.assert_close(draw("", **settings), expected)
    with pytest.raises(ValueError, match=r"prompt_embeds has shape .*; expected \(batch, length"):
        pipe.mark_perfusion([row[:, 1:] for row in embeds], "my-bear")


# FLUX.2


FLUX2 = pytest.mark.parametrize("pipe", ["klein_pipeline", "dev_pipeline"], indirect=True)


@FLUX2
def test_other_layers_of_the_text_encoder_are_warned_of(pipe, draw, caplog):
    pipe.load_perfusion(random_concept(pipe))
    with caplog.at_level(logging.WARNING):
        draw("a <my-cat>", text_encoder_out_layers=(1, 2, 3))
    assert "does not recognise 1 of 1 prompt embeddings" in caplog.text


@FLUX2
def test_flux2_is_called_as_by_the_pipeline(pipe, generate):
    """Latents packed, positions of image and text, timesteps, and guidance where the model is distilled from it."""
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    family = family_of(pipe)
    with torch.no_grad():
        theirs = pipe._encode_vae_image(images * 2 - 1, None)
        ours = family.encode_latents(pipe.vae, images)
        torch.testing.assert_close(pipe._patchify_latents(ours), theirs)
        generate("a cat", pipe, height=16, width=16, latents=theirs, num_inference_steps=1, guidance_scale=1.0)
        encoding = family.encode(family.tokenize(["a cat"]))
        prediction = family.predict(pipe.transformer, ours, torch.tensor([1000]), encoding, 16)
        expected = pipe.transformer(**calls[0])[0]
    one, other = calls[:2]
    for name in ("hidden_states", "timestep", "guidance", "encoder_hidden_states"):
        torch.testing.assert_close(one[name], other[name])
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(one[name][0].float(), other[name])
    packed = pipe._pack_latents(pipe._patchify_latents(prediction))
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-3)


# Z-Image


def test_z_image_is_called_as_by_the_pipeline(z_image_pipeline, generate):
    """Latents, time that runs the other way, and rows of their own length."""
    pipe, calls, outputs = z_image_pipeline, [], []
    pipe.transformer.register_forward_pre_hook(lambda _, args: calls.append(args))
    pipe.transformer.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    generate(
        ["a cat", "a cat on the beach"],
        pipe,
        latents=latents,
        height=16,
        width=16,
        num_inference_steps=1,
        guidance_scale=0.0,
    )
    family = family_of(pipe)
    with torch.no_grad():
        encoding = family.without_padding(family.encode(family.tokenize(["a cat", "a cat on the beach"])))
        prediction = family.predict(pipe.transformer, latents, torch.tensor([1000, 1000]), encoding, 16)
    for theirs, ours in zip(*calls, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(prediction, -torch.stack(outputs[0]).squeeze(2))
    assert [len(row) for row in encoding.hidden_states] == [10, 13]


# Qwen-Image


def test_the_mask_is_that_of_the_superclass_prompt(qwen_image_pipeline, generate):
    """None where it is alone; it makes the text longer where it becomes the longest."""
    pipe, masks = qwen_image_pipeline, []
    pipe.load_perfusion(random_concept(pipe, "<my-bear>", "teddy bear"))
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["encoder_hidden_states_mask"]), with_kwargs=True
    )
    draw = partial(generate, pipe=pipe, height=16, width=16, num_inference_steps=1)
    for prompts in (["a {}"], ["a {}", "a cat"], ["a {}", "a cat on the"], ["a {}", "a cat on"]):
        for word in ("teddy bear", "<my-bear>"):
            draw([prompt.format(word) for prompt in prompts])
    assert masks[:2] == [None, None]
    for plain, edited in zip(masks[2::2], masks[3::2], strict=True):
        assert edited is plain is None or torch.equal(edited.bool(), plain.bool())


def test_qwen_image_is_called_as_by_the_pipeline(qwen_image_pipeline, generate):
    """Latents packed, shapes, timesteps, and text without what stands before the prompt, under a mask."""
    pipe, calls, prompts = qwen_image_pipeline, [], ["a cat", "a cat on the beach"]
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    family = family_of(pipe)
    latents = family.encode_latents(pipe.vae, images)
    packed = pipe._pack_latents(latents, 2, 4, 8, 8)
    generate(prompts, pipe, height=16, width=16, latents=packed, num_inference_steps=1)
    with torch.no_grad():
        encoding = family.encode(family.tokenize(prompts))
        prediction = family.predict(pipe.transformer, latents, torch.tensor([1000, 1000]), encoding, 16)
        expected = pipe.transformer(**calls[0])[0]
    theirs, ours = calls[:2]
    assert theirs["img_shapes"] == ours["img_shapes"]
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_mask"):
        torch.testing.assert_close(theirs[name], ours[name])
    torch.testing.assert_close(pipe._pack_latents(prediction, 2, 4, 8, 8), expected)
    assert encoding.mask.sum(1).tolist() == [7, 10]  # with the five tokens of the chat behind a prompt
    decoded = latents[:, :, None] * torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    decoded = decoded + torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(decoded, pipe.vae.encode(images[:, :, None] * 2 - 1).latent_dist.mode())


@pytest.mark.parametrize(
    ("kind", "components", "reader"),
    [
        (ZImageOmniPipeline, "z_image_components", "siglip"),
        (QwenImageEditPipeline, "qwen_image_components", "processor"),
        (QwenImageEditPlusPipeline, "qwen_image_components", "processor"),
    ],
)
def test_images_among_words_are_refused(request, kind, components, reader):
    more = {"siglip": None, "siglip_processor": None} if reader == "siglip" else {"processor": None}
    pipe = kind(**request.getfixturevalue(components), **more)
    message = rf"{kind.__name__} gives its model images among the words of the prompt \({reader}\)"
    with pytest.raises(ValueError, match=message):
        add_perfusion(pipe)
