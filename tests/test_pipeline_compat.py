"""Concepts where pipelines share models, are copied, pickled, called in threads, or changed by diffusers."""

import copy
import gc
import io
import logging
import pickle
import threading
from functools import partial

import pytest
import torch
from conftest import make_text_encoder, make_unet, make_vae, random_concept
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    Flux2Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
)
from PIL import Image
from transformers import CLIPTokenizer

from diffusers_perfusion import PerfusionPipeline, add_perfusion
from diffusers_perfusion.model_families import cross_attention_layers

CAT, PLAIN = "a <my-cat> on the beach", "a dog on the beach"


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Return what this package has logged since the last call."""
    monkeypatch.setattr(logging.getLogger("diffusers_perfusion"), "propagate", True)

    def run():
        messages = [record.getMessage() for record in caplog.records if "diffusers_perfusion" in record.name]
        caplog.clear()
        return messages

    return run


@pytest.fixture
def cat(make_concept):
    return make_concept("<my-cat>", "cat", 0, bias=0.7)


@pytest.fixture
def edited(pipeline, cat, generate):
    """The image of `CAT` by `pipeline`, with the concept, which stays loaded."""
    pipeline.load_perfusion(cat)
    return generate(CAT)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe, prompt):
    positive, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
    return {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}


def separate(components, tokenizer_folder, **parts):
    """Return parts with a tokenizer and text encoder of their own, as `from_pretrained(base, unet=…)` makes them."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    return components | {"tokenizer": tokenizer, "text_encoder": make_text_encoder(tokenizer)} | parts


# Prompt embeddings that nobody recognises


def mixed(pipe):
    cat, dog = (embeddings(pipe, prompt)["prompt_embeds"] for prompt in (CAT, PLAIN))
    return torch.lerp(cat, dog, 0.5)


def of_another_process(pipe):
    kept = embeddings(pipe, CAT)["prompt_embeds"]
    concept = next(iter(pipe.unet._perfusion.loaded.values())).concept
    pipe.unload_perfusion()
    pipe.load_perfusion(concept)
    return kept


@pytest.mark.parametrize("make", [mixed, of_another_process])
def test_unrecognised_embeddings_are_warned_of(pipeline, edited, generate, warnings, make):
    given = make(pipeline)
    negative = embeddings(pipeline, PLAIN)["negative_prompt_embeds"]
    arguments = {"prompt": None, "prompt_embeds": given, "negative_prompt_embeds": negative}
    for _ in range(2):  # at each call, and not at each step
        generate(CAT, **arguments)
        (message,) = warnings()
        assert "does not recognise 1 of 2 prompt embeddings" in message and "mark_perfusion" in message
    pipeline.mark_perfusion(given, {"my-cat": 2})
    marked = generate(CAT, **arguments)
    assert not warnings()
    pipeline.set_perfusion(bias=0.1)
    assert not torch.allclose(generate(CAT, **arguments), marked, atol=1e-4)


def test_an_unrecognised_row_beside_a_recognised_one_is_warned_of(pipeline, edited, generate, warnings):
    given = embeddings(pipeline, [CAT, CAT])
    given["prompt_embeds"][1] *= 1.1
    generate([CAT, CAT], **given)
    (message,) = warnings()
    assert "does not recognise 1 of 4 prompt embeddings" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_in_another_precision_are_recognised(pipeline, edited, generate, warnings, dtype):
    given = {k: v if v is None else v.to(dtype) for k, v in embeddings(pipeline, CAT).items()}
    close = generate(CAT, **given)
    assert not warnings()
    torch.testing.assert_close(close, edited, atol=0.05, rtol=0)
    pipeline.set_perfusion(bias=0.1)
    assert not torch.allclose(generate(CAT, **given), close, atol=1e-3)


def test_a_model_in_double_precision(pipeline, edited, generate, warnings):
    given = embeddings(pipeline, CAT)
    given = {name: value if value is None else value.double() for name, value in given.items()}
    pipeline.to(torch.float64)
    image = generate(CAT, **given)
    assert image.dtype == torch.float64 and not warnings()
    pipeline.set_perfusion(bias=0.1)
    assert not torch.allclose(generate(CAT, **given), image, atol=1e-3)


def test_plain_prompts_are_recognised(pipeline, edited, generate, warnings):
    given = [embeddings(pipeline, prompt) for prompt in (PLAIN, CAT)]
    for arguments in given:  # the plain one first, although it was not the last that was encoded
        generate(CAT, **arguments)
    generate(PLAIN, negative_prompt=["a beach"])
    assert not warnings()


def test_prompts_may_be_registered_as_plain(pipeline, edited, generate, warnings):
    given = embeddings(pipeline, CAT)
    given["negative_prompt_embeds"] = given["negative_prompt_embeds"] * 1.1
    pipeline.mark_perfusion(given["negative_prompt_embeds"], [])
    generate(CAT, **given)
    assert not warnings()


def test_zeros_are_an_empty_prompt(xl_pipeline, generate, warnings):
    xl_pipeline.load_perfusion(random_concept(xl_pipeline))
    xl_pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    generate(CAT, xl_pipeline)
    assert not warnings()


def test_embeddings_of_before_a_concept_was_loaded_are_warned_of(pipeline, cat, generate, warnings):
    given = embeddings(pipeline, CAT)
    pipeline.load_perfusion(cat)
    generate(CAT, **given)
    assert "does not recognise 2 of 2" in warnings()[0]
    pipeline.disable_perfusion()
    generate(CAT, **given)
    assert not warnings()


# Pipelines that share a model


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_second_pipeline_with_a_tokenizer_of_its_own(
    pipeline, components, tokenizer_folder, cat, generate, edited, when
):
    """As `StableDiffusionImg2ImgPipeline.from_pretrained(base, unet=pipe.unet)` makes it."""
    if when == "after":
        pipeline.unload_perfusion()
    other = quiet(PerfusionPipeline(**separate(components, tokenizer_folder)))
    if when == "after":
        plain = generate(CAT, other)
        pipeline.load_perfusion(cat)
        assert not torch.allclose(generate(CAT, other), plain, atol=1e-3)
    assert torch.equal(generate(CAT, other), edited)
    other.load_perfusion(random_concept(other, "<my-dog>", "dog", 1))
    both = generate("a <my-cat> and a <my-dog>", other)
    assert torch.equal(generate("a <my-cat> and a <my-dog>"), both)
    assert torch.equal(generate(CAT), edited)
    other.unload_perfusion()
    assert pipeline.list_perfusion() == []
    assert "<my-cat>" not in pipeline.tokenizer.get_vocab() | other.tokenizer.get_vocab()


def test_a_stock_pipeline_with_a_tokenizer_of_its_own_is_warned_of(
    pipeline, components, tokenizer_folder, edited, generate, warnings
):
    stock = quiet(StableDiffusionPipeline(**separate(components, tokenizer_folder)))
    generate(CAT, stock)
    assert any("does not recognise" in message for message in warnings())


def test_a_tokenizer_of_its_own_with_a_shared_text_encoder_is_refused(
    pipeline, components, tokenizer_folder, edited, generate
):
    other = PerfusionPipeline(**components | {"tokenizer": CLIPTokenizer.from_pretrained(tokenizer_folder)})
    with pytest.raises(ValueError, match=r"placeholder tokens from another tokenizer .*tokenizer=pipe\.tokenizer"):
        generate(CAT, quiet(other))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_on_one_text_encoder_may_have_the_same_token(pipeline, components, make_concept, generate, order):
    pipes = [pipeline, quiet(PerfusionPipeline(**components | {"unet": make_unet(seed=5)}))]
    concepts = [make_concept(seed=number) for number in range(2)]
    before = [generate(CAT, pipe) for pipe in pipes]
    alone = []
    for pipe, concept in zip(pipes, concepts, strict=True):
        pipe.load_perfusion(concept)
        alone.append(generate(CAT, pipe))
        pipe.unload_perfusion()
    for number in order:
        pipes[number].load_perfusion(concepts[number])
    for pipe, image in zip(pipes, alone, strict=True):
        assert torch.equal(generate(CAT, pipe), image)
    with pytest.raises(ValueError, match="loaded on several models that share this text encoder"):
        ids = pipeline.tokenizer(CAT, return_tensors="pt", padding="max_length").input_ids
        pipeline.text_encoder(ids)
    pipes[0].unload_perfusion()
    assert torch.equal(generate(CAT, pipes[1]), alone[1])
    assert torch.equal(generate(CAT, pipes[0]), before[0])
    pipes[1].unload_perfusion()
    assert torch.equal(generate(CAT, pipes[1]), before[1])


def test_a_token_does_not_leak_to_a_pipeline_of_another_model(pipeline, components, cat, generate):
    other = quiet(PerfusionPipeline(**components | {"unet": make_unet(seed=5)}))
    before = generate(CAT, other)
    pipeline.load_perfusion(cat)
    assert torch.equal(generate(CAT, other), before)


def test_workers_with_a_copy_of_the_unet_around_one_text_encoder(pipeline, components, edited, generate, warnings):
    unet = copy.deepcopy(pipeline.unet)
    assert unet._perfusion.layers.keys() == cross_attention_layers(unet).keys()
    assert all(unet._perfusion.layers[name] is layer for name, layer in cross_attention_layers(unet).items())
    given = embeddings(pipeline, CAT)
    worker = quiet(PerfusionPipeline(**components | {"unet": unet}))
    assert worker.text_encoder is pipeline.text_encoder and worker.get_active_perfusion() == ["my-cat"]
    assert torch.equal(generate(CAT, worker), edited)
    stock = quiet(StableDiffusionPipeline(**components | {"unet": unet}))
    assert torch.equal(generate(CAT, stock), edited)
    assert torch.equal(generate(CAT, stock, **given), edited)
    worker.set_perfusion(bias=0.1)
    assert not torch.allclose(generate(CAT, worker), edited, atol=1e-3)
    assert torch.equal(generate(CAT), edited)
    pipeline.unload_perfusion()
    worker.set_perfusion(bias=0.7)
    assert torch.equal(generate(CAT, worker), edited)
    assert not warnings()


def test_a_copy_of_a_whole_pipeline(pipeline, edited, generate):
    copied = quiet(copy.deepcopy(pipeline))
    assert copied.unet is not pipeline.unet and copied.text_encoder is not pipeline.text_encoder
    assert copied.tokenizer is not pipeline.tokenizer
    assert torch.equal(generate(CAT, copied), edited)
    copied.unload_perfusion()
    assert torch.equal(generate(CAT), edited)
    assert not torch.allclose(generate(CAT, copied), edited, atol=1e-3)


# Pickle


@pytest.mark.parametrize("made_by", ["class", "add_perfusion"])
def test_a_pickled_pipeline_has_its_concepts(components, cat, generate, made_by):
    pipe = quiet(
        PerfusionPipeline(**components) if made_by == "class" else add_perfusion(StableDiffusionPipeline(**components))
    )
    pipe.load_perfusion(cat)
    pipe.set_perfusion(bias=0.3)
    expected = generate(CAT, pipe)
    loaded = pickle.loads(pickle.dumps(pipe))
    assert type(loaded) is type(pipe)
    assert torch.equal(generate(CAT, loaded), expected)
    loaded.unload_perfusion()
    assert "<my-cat>" not in loaded.tokenizer.get_vocab()
    assert not torch.allclose(generate(CAT, loaded), expected, atol=1e-3)


def test_a_saved_unet_has_its_concepts_and_no_text_encoder(pipeline, components, tokenizer_folder, edited, generate):
    file = io.BytesIO()
    torch.save(pipeline.unet, file)
    assert b"CLIPTextModel" not in file.getvalue()
    file.seek(0)
    unet = torch.load(file, weights_only=False)
    other = quiet(PerfusionPipeline(**separate(components, tokenizer_folder, unet=unet)))
    assert torch.equal(generate(CAT, other), edited)


# Frames


def test_a_unet_that_repeats_rows_for_its_frames(components, cat, generate):
    """`UNet3DConditionModel` repeats its rows in `forward`, of the prompts and the negative prompts alike."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    parts = {name: components[name] for name in ("text_encoder", "tokenizer", "scheduler")}
    pipe = quiet(add_perfusion(TextToVideoSDPipeline(**parts, unet=unet, vae=make_vae(AutoencoderKL))))

    def run(prompt):
        generator = torch.Generator().manual_seed(0)
        settings = {"num_frames": 3, "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
        return pipe(prompt, generator=generator, **settings).frames

    before = run(CAT), run(PLAIN)
    pipe.load_perfusion(random_concept(pipe))
    edited = run(CAT)
    assert torch.equal(run(PLAIN), before[1])
    assert ((edited - before[0]).abs().flatten(2).amax(-1) > 1e-3).all()
    pipe.set_perfusion(bias=0.1, temperature=1.0)
    assert ((run(CAT) - edited).abs().flatten(2).amax(-1) > 1e-4).all()
    pipe.set_perfusion(locking="global")
    run(CAT)
    pipe.unload_perfusion()
    assert torch.equal(run(CAT), before[0])


# Case


@pytest.mark.parametrize("written", ["my-cat", "< my-cat >", "My-Cat", "<my-cat"])
def test_a_token_without_its_brackets_is_warned_of(pipeline, edited, generate, warnings, written):
    generate(f"a {written} on the beach")
    (message,) = warnings()
    assert f"{written.strip('<> ')!r}, but not the placeholder token '<my-cat>'" in message


@pytest.mark.parametrize("prompt", ["a <my-cat>", "a cat", "a my-cat-2", "my cats", "a <MY-CAT> like my-cat"])
def test_no_warning_of_other_words(pipeline, edited, generate, warnings, prompt):
    generate(prompt)
    assert not warnings()


def test_a_token_off_the_end_of_one_prompt_is_warned_of(pipeline, edited, generate, warnings):
    generate(["a <my-cat>", "<my-cat> and a <my-cat>"], negative_prompt=["a <my-cat>", "a dog"])
    assert not warnings()
    generate(["a <my-cat>", "a photo of " * 10 + "a <my-cat>"])
    (message,) = warnings()
    assert message.startswith("<my-cat> falls off the end of a prompt, of which the text encoder reads only the begin")


@pytest.mark.parametrize("token", ["<my-cat>", "<My-Cat>"])
@pytest.mark.parametrize("name", ["pipeline", "xl_pipeline", "pixart_pipeline", "sana_pipeline"])
def test_a_token_is_found_in_any_case(request, generate, name, token):
    pipe = request.getfixturevalue(name)
    arguments = {
        "pixart_pipeline": {"height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False},
        "sana_pipeline": {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False},
    }.get(name, {})
    pipe.load_perfusion(random_concept(pipe, token))
    expected = generate(f"a {token} on the beach", pipe, **arguments)
    for written in ("<my-cat>", "<My-Cat>", "<MY-CAT>"):
        assert torch.equal(generate(f"a {written} on the beach", pipe, **arguments), expected)


def test_the_tokenizer_alone_finds_a_token_in_any_case(fast_tokenizer, pipeline, edited):
    ids = [pipeline.tokenizer(f"a {token}").input_ids for token in ("<my-cat>", "<My-Cat>")]
    assert ids[0] == ids[1] and len(ids[0]) == 4


def test_tokens_that_differ_in_case_alone_are_refused(fast_tokenizer, pipeline, edited, make_concept):
    with pytest.raises(ValueError, match=r"'<My-Cat>' differs only in case from '<my-cat>'"):
        pipeline.load_perfusion(make_concept("<My-Cat>", seed=1), "other")


# Prompts that a text encoder rewrites


@pytest.fixture
def rewriting(dev_pipeline, generate):
    """Draw prompts that the text encoder of `dev_pipeline` has rewritten, which has a concept."""
    dev_pipeline.load_perfusion(random_concept(dev_pipeline))
    return partial(
        generate, pipe=dev_pipeline, height=16, width=16, max_sequence_length=64, caption_upsample_temperature=0.1
    )


def test_a_token_that_the_text_encoder_writes_again_is_applied(dev_pipeline, rewriting, warnings, monkeypatch):
    """For it is read letter by letter, also where the concept is that of another model."""
    tokenizer, read = dev_pipeline.tokenizer.tokenizer, []

    def write(input_ids, **settings):
        assert "<my-cat>" not in tokenizer.get_vocab()
        read.append(tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, tokenizer("a good <My-Cat>", return_tensors="pt").input_ids], 1)

    expected = rewriting("a good <my-cat>", caption_upsample_temperature=None)
    monkeypatch.setattr(dev_pipeline.text_encoder, "generate", write)
    assert torch.equal(rewriting("a <my-cat>"), expected) and "[INST]a <my-cat>[/INST]" in read[0]
    assert torch.equal(rewriting("a dog"), expected)
    assert not warnings()
    parts = dev_pipeline.components
    other = quiet(add_perfusion(Flux2Pipeline(**parts | {"transformer": copy.deepcopy(parts["transformer"])})))
    other.unload_perfusion()
    rewriting("a <my-cat>", pipe=other)
    assert "[INST]a <my-cat>[/INST]" in read[-1] and len(read) == 3 and not warnings()


def test_a_token_that_the_text_encoder_does_not_write_again_is_warned_of(dev_pipeline, rewriting, warnings):
    generation = dev_pipeline.text_encoder.generation_config
    generation.eos_token_id = list(range(len(dev_pipeline.tokenizer.tokenizer)))  # after any one
    rewriting("a dog")
    assert not warnings()
    rewriting(["a dog", "a <MY-cat>"])
    (message,) = warnings()
    assert message.startswith("<my-cat> is in a prompt, but not in what the text encoder has rewritten it to")
    dev_pipeline.disable_perfusion()
    rewriting("a <my-cat>")
    assert not warnings()


# What diffusers and users do


def test_a_pipeline_with_a_processor_is_connected_once(dev_pipeline, monkeypatch):
    dev_pipeline.load_perfusion(random_concept(dev_pipeline))
    monkeypatch.setattr("diffusers_perfusion.pipeline_compat.family_of", None)
    dev_pipeline.encode_prompt("a <my-cat>")


def test_pipelines_of_another_task(components, cat, generate):
    pipe = quiet(PerfusionPipeline(**components | {"vae": make_vae(AutoencoderKL)}))
    pipe.load_perfusion(cat)
    arguments = {"image": Image.new("RGB", (16, 16), "red"), "strength": 0.9}
    other = quiet(AutoPipelineForImage2Image.from_pipe(pipe))
    assert isinstance(other, StableDiffusionImg2ImgPipeline)
    with_concept = generate(CAT, other, **arguments)
    pipe.disable_perfusion()
    assert not torch.allclose(generate(CAT, other, **arguments), with_concept, atol=1e-3)
    assert AutoPipelineForInpainting.from_pipe(pipe).unet is pipe.unet
    assert AutoPipelineForText2Image.from_pipe(pipe).unet is pipe.unet


def test_the_same_text_encoder_may_come_back(pipeline, edited, generate):
    text_encoder = pipeline.text_encoder
    given = embeddings(pipeline, CAT)
    pipeline.text_encoder = None
    assert torch.equal(generate(CAT, **given), edited)
    pipeline.text_encoder = text_encoder
    assert torch.equal(generate(CAT), edited)


def test_from_a_compiled_unet_to_the_plain_one(pipeline, edited, generate):
    plain = pipeline.unet
    pipeline.unet = torch.compile(plain, backend="eager")
    torch.testing.assert_close(generate(CAT), edited)
    pipeline.unet = plain
    assert torch.equal(generate(CAT), edited)


def test_a_processor_that_somebody_holds_edits_nothing_after_unloading(pipeline, edited, generate):
    held = dict(pipeline.unet.attn_processors)
    pipeline.unload_perfusion()
    before = generate(CAT)
    pipeline.unet.set_attn_processor(dict(held))
    assert torch.equal(generate(CAT), before)


class Wrapper:
    """Counts calls, as a package that looks at attention does."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        self.calls += 1
        return self.inner(attn, hidden_states, encoder_hidden_states, **kwargs)


def closure(inner):
    def call(attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return inner(attn, hidden_states, encoder_hidden_states, **kwargs)

    return call


@pytest.mark.parametrize("wrap", [Wrapper, closure, lambda inner: Wrapper(Wrapper(inner))])
def test_a_package_may_wrap_our_processors(pipeline, edited, generate, warnings, wrap):
    for layer in cross_attention_layers(pipeline.unet).values():
        layer.processor = wrap(layer.processor)
    assert torch.equal(generate(CAT), edited)
    pipeline.set_perfusion(bias=0.7)
    pipeline.enable_perfusion()
    assert torch.equal(generate(CAT), edited)
    assert not warnings()


def test_a_whole_unet_is_compiled_without_a_break(pipeline, edited, generate):
    pipeline.unet.compile(backend="eager", fullgraph=False)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(generate(CAT), edited)
    reasons = " ".join(torch._dynamo.utils.counters["graph_break"])
    assert "PerfusionAttnProcessor" not in reasons


def test_pipelines_of_one_s_own(components, cat, generate, edited):
    class Mine(PerfusionPipeline):
        def encode_prompt(self, *args, **kwargs):
            return super().encode_prompt(*args, **kwargs)

    pipe = quiet(Mine(**components))
    assert torch.equal(generate(CAT, pipe), edited)


def test_a_token_of_letters_changes_no_other_word(pixart_pipeline, generate):
    """The pipeline lower-cases prompts, and the tokenizer does not."""
    arguments = {"use_resolution_binning": False, "clean_caption": False}
    plain = generate("a bobsled on the beach", pixart_pipeline, **arguments)
    pixart_pipeline.load_perfusion(random_concept(pixart_pipeline, "Bob"))
    assert torch.equal(generate("a bobsled on the beach", pixart_pipeline, **arguments), plain)
    assert not torch.allclose(
        generate("a bob on the beach", pixart_pipeline, **arguments),
        generate("a bog on the beach", pixart_pipeline, **arguments),
    )


def test_a_freed_text_encoder_leaves_the_tokenizer(pipeline, components, cat, generate):
    tokens = len(pipeline.tokenizer)
    pipeline.load_perfusion(cat)
    pipeline.text_encoder = components["text_encoder"] = None
    gc.collect()
    assert len(pipeline.tokenizer) == tokens
    pipeline.text_encoder = make_text_encoder(pipeline.tokenizer)
    generate(CAT)
    assert len(pipeline.tokenizer) > tokens
    pipeline.unload_perfusion()
    assert len(pipeline.tokenizer) == tokens


def test_a_freed_pipeline_leaves_the_model_to_others(
    pipeline, components, tokenizer_folder, edited, generate, make_concept
):
    other = quiet(PerfusionPipeline(**separate(components, tokenizer_folder)))
    assert torch.equal(generate(CAT, other), edited)
    del other
    gc.collect()
    pipeline.load_perfusion(make_concept("<my-dog>", "dog", 1))
    assert torch.equal(generate(CAT), edited)
    copy.deepcopy(pipeline.unet)
    pipeline.delete_perfusion("my-dog")
    assert torch.equal(generate(CAT), edited)


def test_a_tokenizer_for_two_text_encoders_is_refused(pipeline, components, edited):
    other = PerfusionPipeline(**components | {"text_encoder": make_text_encoder(components["tokenizer"], seed=3)})
    with pytest.raises(ValueError, match="this tokenizer has placeholder tokens for another text encoder"):
        other.encode_prompt(CAT, "cpu", 1, True)


def test_decoding_is_as_without_a_concept(pipeline, cat):
    tokenizer = pipeline.tokenizer
    ids = tokenizer("a photo of a cat on the beach").input_ids
    before = tokenizer.decode(ids)
    pipeline.load_perfusion(cat)
    assert tokenizer.decode(ids) == before
    assert "<my-cat>" in tokenizer.decode(tokenizer(CAT).input_ids)


def test_pipelines_in_several_threads(pipeline, plain_pipeline, cat, generate):
    """On one UNet, each with its own prompt: each gets its own image."""
    pipeline.load_perfusion(cat)
    prompts = [CAT, PLAIN, "<my-cat>", "a photo"]
    expected = [generate(prompt) for prompt in prompts]
    pipes = [quiet(PerfusionPipeline.from_pipe(plain_pipeline, vae=plain_pipeline.vae)) for _ in prompts]
    for pipe in pipes:
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
    for _ in range(3):
        images, errors = [None] * len(prompts), []

        def run(number, images=images, errors=errors):
            try:
                images[number] = generate(prompts[number], pipes[number])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert all(torch.equal(image, wanted) for image, wanted in zip(images, expected, strict=True))
