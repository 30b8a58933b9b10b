import re
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import random_concept
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, StableDiffusionPipeline

from diffusers_perfusion import PerfusionPipeline, PerfusionXLPipeline, add_perfusion


def test_a_concept_changes_only_the_prompts_that_hold_its_token(pipeline, make_concept, generate):
    prompts = ["a cat on the beach", "a <my-cat> on the beach"]
    before = generate(prompts)
    pipeline.load_perfusion(make_concept())
    after = generate(prompts)
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-2)


def test_pipeline_from_an_ordinary_one_and_back(pipeline, plain_pipeline, make_concept, generate):
    made = PerfusionPipeline.from_pipe(plain_pipeline, vae=plain_pipeline.vae)
    made.set_progress_bar_config(disable=True)
    made.load_perfusion(make_concept())
    back = StableDiffusionPipeline.from_pipe(made, vae=made.vae)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(generate("a <my-cat>", made), generate("a <my-cat>", back))
    assert not torch.equal(generate("a <my-cat>", made), generate("a cat", made))


def test_a_pipeline_is_made_without_a_warning(plain_pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PerfusionPipeline(**plain_pipeline.components, requires_safety_checker=False)


def test_add_perfusion_keeps_the_pipeline_what_it_was(plain_pipeline, make_concept, generate):
    before = generate("a <my-cat>", plain_pipeline)
    assert add_perfusion(plain_pipeline) is plain_pipeline
    assert add_perfusion(plain_pipeline) is plain_pipeline
    assert isinstance(plain_pipeline, StableDiffusionPipeline)
    assert type(plain_pipeline).__name__ == "StableDiffusionPipeline"
    plain_pipeline.load_perfusion(make_concept())
    assert not torch.equal(generate("a <my-cat>", plain_pipeline), before)
    plain_pipeline.unload_perfusion()
    assert torch.equal(generate("a <my-cat>", plain_pipeline), before)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_pipeline_is_saved_as_any_diffusers_can_load_it(pipeline, make_concept, generate, tmp_path, enabled):
    base = generate("a <my-cat>")
    pipeline.load_perfusion(make_concept())
    if not enabled:
        pipeline.disable_perfusion()
    before = generate("a <my-cat>")
    pipeline.save_pretrained(tmp_path)
    assert type(pipeline) is PerfusionPipeline
    assert torch.equal(generate("a <my-cat>"), before)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is StableDiffusionPipeline
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate("a <my-cat>", loaded), base)


def test_concepts_are_saved_beside_the_models_and_come_back(pipeline, make_concept, generate, tmp_path):
    prompt = "a <my-cat> and a <my-dog>"
    pipeline.load_perfusion([make_concept(), make_concept("<my-dog>", "dog", seed=1)], ["me/cat: 1", "dog"])
    pipeline.save_pretrained(tmp_path)
    loaded = PerfusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is PerfusionPipeline
    assert sorted(loaded.list_perfusion()) == ["dog", "me/cat: 1"]
    torch.testing.assert_close(generate(prompt, loaded), generate(prompt), atol=1e-2, rtol=0)  # saved in float16
    pipeline.unload_perfusion()
    assert (generate(prompt, loaded) - generate(prompt)).abs().max() > 0.05


def test_a_pipeline_of_two_text_encoders_is_saved_with_its_concepts(xl_pipeline, generate, tmp_path):
    prompt = "a <my-cat> and a cat"
    xl_pipeline.load_perfusion(random_concept(xl_pipeline))
    xl_pipeline.save_pretrained(tmp_path)
    loaded = PerfusionXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    difference = (generate(prompt, loaded) - generate(prompt, xl_pipeline)).abs().max()
    xl_pipeline.unload_perfusion()
    assert 10 * difference < (generate(prompt, loaded) - generate(prompt, xl_pipeline)).abs().max()


def test_concepts_of_one_family_are_refused_by_another(pipeline, xl_pipeline, make_concept):
    with pytest.raises(ValueError, match=r"edits hidden states of width 56, but .* takes width 32"):
        pipeline.load_perfusion(random_concept(xl_pipeline))
    with pytest.raises(ValueError, match=r"edits hidden states of width 32, but .* takes width 56"):
        xl_pipeline.load_perfusion(make_concept())
    concept = random_concept(xl_pipeline)
    one_word = replace(concept, token_embeddings=concept.token_embeddings[:1])
    with pytest.raises(ValueError, match=r"has 1 token embeddings, but this pipeline has 2 text encoders"):
        xl_pipeline.load_perfusion(one_word)


def test_neither_order_changes_a_bit(pipeline, make_concept, generate):
    """Of loading, and of activating."""
    cat, dog = make_concept(), make_concept("<my-dog>", "dog", seed=1)
    pipeline.load_perfusion([cat, dog])
    generated = generate("a <my-cat> on a <my-dog>")
    pipeline.unload_perfusion()
    pipeline.load_perfusion([dog, cat])
    assert torch.equal(generate("a <my-cat> on a <my-dog>"), generated)
    pipeline.set_perfusion(["my-cat", "my-dog"])
    assert torch.equal(generate("a <my-cat> on a <my-dog>"), generated)


def test_layers_are_skipped_of_prompts_and_not_of_negative_ones(xl_pipeline, generate):
    xl_pipeline.load_perfusion(random_concept(xl_pipeline))
    negative = {"negative_prompt": ["a <my-cat>"], "clip_skip": 1}
    edited = generate("a beach", xl_pipeline, **negative)
    xl_pipeline.set_perfusion(bias=0.1)
    assert (generate("a beach", xl_pipeline, **negative) - edited).abs().max() > 1e-3


@pytest.mark.parametrize("clean_caption", [False, True])
def test_tokens_survive_what_pixart_does_to_prompts(pixart_pipeline, monkeypatch, clean_caption):
    """It lower-cases them, or takes what is in angle brackets for HTML."""
    pipe = pixart_pipeline
    monkeypatch.setattr(
        PixArtSigmaPipeline, "_clean_caption", lambda self, text: re.sub("<[^>]*>", "", text).lower(), raising=True
    )
    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(f"diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma.{name}", lambda: True)
    for word in ("<My-Cat>", "<My-Cat>2"):
        pipe.load_perfusion(random_concept(pipe, word, seed=len(word)))
    prompts = ["A <My-Cat>2 and <My-Cat>, on the <b>Beach</b>", "A Cat"]
    kept = "beach" if clean_caption else "<b>beach</b>"
    expected = [f"a <My-Cat>2 and <My-Cat>, on the {kept}", "a cat"]
    assert pipe._text_preprocessing(prompts, clean_caption=clean_caption) == expected
    assert pipe._text_preprocessing(prompts[1], clean_caption=clean_caption) == expected[1:]
    pipe.unload_perfusion()
    assert "My" not in pipe._text_preprocessing(prompts, clean_caption=clean_caption)[0]
