"""Text of three text encoders, one behind the other two, on a tiny Stable Diffusion 3.5 pipeline."""

import logging
from functools import partial

import pytest
import torch
from conftest import LENGTH, effect, make_sd3, random_concept
from diffusers import StableDiffusion3PAGPipeline, StableDiffusion3Pipeline

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.joint_attention import value_sites
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.registry import registry_of

BEAR, PLAIN, OTHER = "a <my-bear> on the beach", "a teddy bear on the beach", "a cat"


@pytest.fixture
def pipe(sd3_pipeline):
    sd3_pipeline.transformer.requires_grad_(False)
    return sd3_pipeline


@pytest.fixture
def draw(pipe, generate):
    return partial(generate, pipe=pipe, height=16, width=16, max_sequence_length=LENGTH)


def drop_t5(pipe):
    pipe.text_encoder_3 = pipe.tokenizer_3 = None


def places(pipe, prompt, word=" bear"):
    """Where a word is in the hidden states of a prompt: among CLIP's tokens, and T5's behind them."""
    return [
        start + tokenizer(prompt).input_ids.index(tokenizer(word, add_special_tokens=False).input_ids[-1])
        for start, tokenizer in ((0, pipe.tokenizer), (LENGTH, pipe.tokenizer_3))
        if tokenizer is not None
    ]


@pytest.fixture
def edited_places(pipe):
    """Return the positions at which each row's values are edited, found in the first layer; one list for each call."""
    found = []

    def record(module, args, output):
        found.append([row.any(-1).nonzero()[:, 0].tolist() for row in output - module.forward(*args)])

    def watch():
        found.clear()
        value_sites(pipe.transformer.transformer_blocks[0].attn)[0].module.register_forward_hook(record)
        return found

    return watch


@pytest.mark.parametrize("t5", [True, False])
def test_a_closed_gate_gives_the_superclass_prompt(pipe, draw, concept, t5):
    if not t5:
        drop_t5(pipe)
    plain, with_text = draw(PLAIN), draw(BEAR)
    pipe.load_perfusion(concept())
    assert effect(draw(BEAR), plain) > 1e-3
    assert torch.equal(draw(PLAIN), plain)
    with pipe.set_perfusion(bias=2.0, temperature=0.01):
        assert torch.equal(draw(BEAR), plain)
    pipe.disable_perfusion()
    assert torch.equal(draw(BEAR), with_text)


def test_values_are_edited_among_the_tokens_of_clip_and_of_t5(pipe, draw, concept, edited_places):
    pipe.load_perfusion(concept())
    found = edited_places()
    draw([BEAR, OTHER], num_inference_steps=1, guidance_scale=1.0)
    clip, t5 = places(pipe, PLAIN)
    assert found == [[[clip, t5], []]] and t5 >= LENGTH + 2


def test_a_superclass_of_another_length_in_each_tokenizer(pipe, draw, concept, edited_places):
    plain = draw("a bears on the beach")
    pipe.load_perfusion(concept(superclass="bears"))
    with pipe.set_perfusion(bias=2.0, temperature=0.01):
        assert torch.equal(draw(BEAR), plain)
    found = edited_places()
    draw(BEAR, num_inference_steps=1, guidance_scale=1.0)
    clip, t5 = (
        len(tokenizer(" bears", add_special_tokens=False).input_ids)
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_3)
    )
    assert found == [[[1 + clip, LENGTH + t5]]] and clip != t5  # behind the start and "a"; behind CLIP and "a"


@pytest.mark.parametrize("name", ["prompt", "prompt_2", "prompt_3"])
def test_a_token_in_one_of_three_prompts(pipe, draw, concept, edited_places, caplog, name):
    others = {other: [OTHER] for other in ("prompt", "prompt_2", "prompt_3") if other != name}

    def run(prompt, **arguments):
        return draw(prompt, **others | {name: [prompt]} | arguments)

    plain = run(PLAIN)
    pipe.load_perfusion(concept())
    with caplog.at_level(logging.WARNING):
        edited = run(BEAR)
        with pipe.set_perfusion(bias=2.0, temperature=0.01):
            closed = run(BEAR)
    assert effect(edited, plain) > 1e-3 and not caplog.text
    assert torch.equal(closed, plain)
    found = edited_places()
    run(BEAR, num_inference_steps=1, guidance_scale=1.0)
    clip, t5 = places(pipe, PLAIN)
    assert found == [[[t5 if name == "prompt_3" else clip]]]


def test_a_token_for_a_text_encoder_that_is_not_there_is_warned_of(pipe, draw, concept, caplog):
    drop_t5(pipe)
    pipe.load_perfusion(concept())
    with caplog.at_level(logging.WARNING):
        draw([BEAR, OTHER])
        assert not caplog.text
        draw([BEAR, OTHER], prompt_3=[OTHER, BEAR])
    (record,) = caplog.records
    assert record.message.startswith("<my-bear> is in a prompt of which the model gets no hidden states")
    assert record.message.endswith("expected it in prompt or prompt_2.")


def test_a_token_that_clip_does_not_read_is_found_in_t5(pipe, concept, caplog):
    pipe.load_perfusion(concept())
    long = "a photo of a photo of a photo of " * 3 + "a <my-bear>"
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt([BEAR, long], None, None, max_sequence_length=40)
        assert not [record for record in caplog.records if record.name.startswith("diffusers_perfusion")]
        pipe.encode_prompt([BEAR, long], None, None, max_sequence_length=LENGTH)
    assert "<my-bear> falls off the end of a prompt" in caplog.text


@pytest.mark.parametrize("kept", [True, False])
def test_t5_may_go_when_concepts_are_loaded(pipe, draw, concept, kept):
    """Somebody else may keep it. A concept that is loaded then edits too."""
    made, other = concept(), concept("<my-cat>", "cat", 1)
    pipe.load_perfusion(made)
    draw(BEAR)
    t5 = pipe.text_encoder_3 if kept else None
    drop_t5(pipe)
    edited = draw(BEAR)
    pipe.load_perfusion(other)
    both = draw("a <my-cat>")
    pipe.unload_perfusion()
    pipe.load_perfusion([made, other])
    assert torch.equal(draw(BEAR), edited) and effect(edited, draw(PLAIN)) > 1e-3
    assert torch.equal(draw("a <my-cat>"), both) and effect(both, draw("a cat")) > 1e-3
    assert t5 is None or not hasattr(t5, "_perfusion_tokens")


def test_t5_that_comes_when_concepts_are_loaded(pipe, draw, concept):
    text_encoder, tokenizer = pipe.text_encoder_3, pipe.tokenizer_3
    drop_t5(pipe)
    made = concept()
    made.token_embeddings.append(torch.zeros(60))
    pipe.load_perfusion(made)
    pipe.text_encoder_3, pipe.tokenizer_3 = text_encoder, tokenizer
    edited = draw(BEAR)
    pipe.unload_perfusion()
    pipe.load_perfusion(made)
    assert torch.equal(draw(BEAR), edited)


def test_concepts_without_an_embedding_for_t5_are_not_for_pipelines_with_it(pipe, draw, concept):
    made = concept()
    made.token_embeddings = made.token_embeddings[:2]
    with pytest.raises(ValueError, match="has 2 token embeddings, but this pipeline has 3 text encoders"):
        pipe.load_perfusion(made)
    drop_t5(pipe)
    plain = draw(BEAR)
    pipe.load_perfusion(made)
    assert effect(draw(BEAR), plain) > 1e-3
    pipe.unload_perfusion()
    made.token_embeddings = made.token_embeddings[:1]
    with pytest.raises(ValueError, match="has 1 token embeddings, but this pipeline has 2 text encoders"):
        pipe.load_perfusion(made)


def test_the_text_encoders_may_go_once_prompts_are_encoded(pipe, draw, concept):
    pipe.load_perfusion(concept())
    expected = draw([BEAR, OTHER])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        encoded = pipe.encode_prompt([BEAR, OTHER], None, None, max_sequence_length=LENGTH)
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    arguments = dict(zip(names, encoded, strict=True))
    assert torch.equal(draw([BEAR, OTHER], prompt=None, **arguments), expected)


def test_concepts_of_other_models_are_refused(pipe, concept, make_concept, flux_pipeline):
    with pytest.raises(ValueError, match=r"width 32, but SD3Transformer2DModel .* takes width 60"):
        pipe.load_perfusion(make_concept())
    with pytest.raises(ValueError, match=r"width 20, but SD3Transformer2DModel .* takes width 60"):
        pipe.load_perfusion(random_concept(flux_pipeline))
    with pytest.raises(ValueError, match=r"width 60, but FluxTransformer2DModel .* takes width 20"):
        flux_pipeline.load_perfusion(concept())
    deep = concept()
    deep.target_outputs["transformer_blocks.3.attn"] = torch.ones(16)
    with pytest.raises(ValueError, match=r"does not have the attention layers of .*: 0 missing .* 1 unknown"):
        pipe.load_perfusion(deep)
    assert registry_of(pipe.transformer) is None


def test_the_last_layer_counts(pipe, draw, concept):
    """It leaves the text as it is, but the image looks at its values."""
    made = concept()
    last = "transformer_blocks.2.attn"
    assert list(made.target_outputs)[-1] == last and pipe.transformer.transformer_blocks[2].context_pre_only
    made.target_outputs = {
        name: output if name == last else torch.zeros_like(output) for name, output in made.target_outputs.items()
    }
    plain = draw(PLAIN)
    pipe.load_perfusion(made)
    assert effect(draw(BEAR), plain) > 1e-3


def test_rows_that_perturbed_attention_guidance_takes_in_parts(sd3_components, generate):
    """The prompts after the negative ones, and then the prompts again."""
    pipe = add_perfusion(StableDiffusion3PAGPipeline(**sd3_components, pag_applied_layers=["blocks.1"]))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_perfusion(random_concept(pipe, "<my-bear>", "teddy bear"))
    found = []

    def record(module, args, output):
        found.append([bool(row.any()) for row in output - module.forward(*args)])

    pipe.transformer.transformer_blocks[1].attn.add_v_proj.register_forward_hook(record)
    generate([OTHER, BEAR], pipe, height=16, width=16, max_sequence_length=LENGTH, pag_scale=2.0)
    assert found == [[False, False, False, True], [False, True]] * 3


def test_fused_projections(sd3_components, generate):
    """Of Stable Diffusion 3.0: diffusers' own processor for them cannot do what 3.5 needs."""
    pipe = add_perfusion(StableDiffusion3Pipeline(**sd3_components | {"transformer": make_sd3()}))
    pipe.set_progress_bar_config(disable=True)
    draw = partial(generate, pipe=pipe, height=16, width=16, max_sequence_length=LENGTH)
    plain = draw(BEAR)
    pipe.load_perfusion(random_concept(pipe, "<my-bear>", "teddy bear"))
    expected = draw(BEAR)
    assert effect(expected, plain) > 1e-3
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(draw(BEAR), expected, atol=1e-5, rtol=1e-4)
    pipe.unload_perfusion()
    torch.testing.assert_close(draw(BEAR), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("t5", [True, False])
def test_the_model_is_called_as_by_the_pipeline(pipe, draw, t5):
    if not t5:
        drop_t5(pipe)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    length = LENGTH if t5 else 256  # of zeros, which no tokenizer bounds
    draw(PLAIN, latents=latents, num_inference_steps=1, guidance_scale=1.0, max_sequence_length=length)
    family = family_of(pipe)
    with torch.no_grad():
        encoding = family.encode(family.tokenize([PLAIN]))
        prediction = family.predict(pipe.transformer, latents, torch.tensor([1000]), encoding, 16)
        expected = pipe.transformer(**calls[0][1])[0]
    (_, theirs), (given, ours) = calls[:2]
    ours = ours | {"hidden_states": given[0]}
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"):
        torch.testing.assert_close(theirs[name], ours[name], check_dtype=False)
    torch.testing.assert_close(prediction, expected)
