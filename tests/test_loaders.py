"""What a user does with concepts on a pipeline, judged by the images that come out."""

import copy
import itertools
import logging
import random
import re
from functools import partial

import pytest
import torch
from conftest import LENGTH, make_unet, make_vae, places_of
from diffusers import AutoencoderKL, DiTPipeline, StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor

from diffusers_perfusion import PerfusionConcept, PerfusionPipeline, add_perfusion, concept_file
from diffusers_perfusion.attention_processor import PerfusionAttnProcessor
from diffusers_perfusion.concept import WEIGHT_NAME
from diffusers_perfusion.registry import registry_of

PROMPTS = ["a <my-cat> on the beach", "a cat on the beach"]
CAT, DOG = "a photo of <my-cat>", "a photo of <my-dog>"
BOTH = "a <my-cat> and a <my-dog> on the beach"


class Untouched:
    """What must not change: the tokenizer, the hooks, the processors and the images of a pipeline."""

    def __init__(self, pipeline, generate):
        self.pipeline, self.generate = pipeline, generate
        self.processors = dict(pipeline.unet.attn_processors)
        self.rest = self._rest()

    def _rest(self):
        tokenizer, text_encoder, unet = self.pipeline.tokenizer, self.pipeline.text_encoder, self.pipeline.unet
        hooks = [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for model in (text_encoder, unet)
            for module in model.modules()
        ]
        prompts = [*PROMPTS, CAT, DOG, "<foo>"]
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        images = self.generate(prompts, self.pipeline).tolist()
        return hooks, ids, images, tokenizer.get_vocab(), vars(unet).keys(), unet.state_dict().keys()

    def check(self):
        processors = self.pipeline.unet.attn_processors
        assert processors.keys() == self.processors.keys()
        assert all(processors[name] is processor for name, processor in self.processors.items())
        assert all(now == before for now, before in zip(self._rest(), self.rest, strict=True))


@pytest.fixture
def untouched(pipeline, generate):
    return Untouched(pipeline, generate)


@pytest.fixture
def cat(make_concept):
    return make_concept("<my-cat>", "cat", 0, bias=0.7, temperature=0.15)


@pytest.fixture
def dog(make_concept):
    return make_concept("<my-dog>", "dog", 1, bias=0.7, temperature=0.15)


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Messages that diffusers and this package have logged since the last call."""
    for name in ("diffusers", "diffusers_perfusion"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)

    def run():
        messages = [record.getMessage() for record in caplog.records if "diffusers_perfusion" in record.name]
        caplog.clear()
        return messages

    return run


def differ(one, other):
    """Whether each of some images is another, by more than rounding."""
    return bool(((one - other).abs().flatten(1).amax(1) > 5e-4).all())


def close(one, other):
    return torch.allclose(one, other, atol=5e-5)


def settings(pipeline):
    """`(β, τ)` of every loaded concept."""
    loaded = registry_of(pipeline.unet).loaded
    return {name: (round(e.bias.item(), 4), round(e.temperature.item(), 4)) for name, e in loaded.items()}


# Loading


def sources(cat, folder):
    """The same concept as everything that can be loaded, with what the call needs besides."""
    cat.save(folder / "one" / WEIGHT_NAME, torch.float32)
    cat.save(folder / "two" / "step-100" / "cat.safetensors", torch.float32)
    return {
        "concept": (cat, {}),
        "file": (folder / "one" / WEIGHT_NAME, {}),
        "file as str": (str(folder / "two" / "step-100" / "cat.safetensors"), {}),
        "folder": (str(folder / "one"), {}),
        "subfolder": (folder / "two", {"subfolder": "step-100", "weight_name": "cat.safetensors"}),
        "state dict": (cat.state_dict(torch.float32), {}),
        "list": ([folder / "one"], {}),
    }


@pytest.mark.parametrize("kind", ["file", "file as str", "folder", "subfolder", "state dict", "list"])
def test_every_kind_of_source_gives_the_same_image(pipeline, cat, generate, tmp_path, kind):
    pipeline.load_perfusion(cat)
    expected = generate(PROMPTS)
    pipeline.unload_perfusion()
    source, arguments = sources(cat, tmp_path)[kind]
    pipeline.load_perfusion(source, **arguments)
    assert pipeline.list_perfusion() == pipeline.get_active_perfusion() == ["my-cat"]
    assert close(generate(PROMPTS), expected)


def test_names_are_given_or_come_from_the_token(pipeline, make_concept):
    concepts = [make_concept(f"<cat-{n}>", seed=n) for n in range(5)]
    pipeline.load_perfusion(concepts[0])
    pipeline.load_perfusion(concepts[1], "felix")
    pipeline.load_perfusion(concepts[2:4], ["tom", None])
    pipeline.load_perfusion((concepts[4],), concept_name=["garfield"])
    assert pipeline.list_perfusion() == ["cat-0", "felix", "tom", "cat-3", "garfield"]
    assert pipeline.get_active_perfusion() == pipeline.list_perfusion()


def test_a_token_of_brackets_alone_is_its_own_name(pipeline, make_concept, generate, warnings):
    pipeline.load_perfusion(make_concept("<>"))
    assert pipeline.list_perfusion() == ["<>"]
    generate("a cat on the beach")
    assert not warnings()
    assert differ(generate("a <> on the beach"), generate("a cat on the beach"))


def test_a_concept_can_get_another_placeholder_token(pipeline, cat, generate, untouched, tmp_path):
    """Two people may both have called theirs <my-cat>."""
    pipeline.load_perfusion(cat)
    expected = generate(CAT)
    pipeline.unload_perfusion()
    pipeline.load_perfusion(cat, placeholder_token="<Felix>")
    assert cat.placeholder_token == "<my-cat>"
    assert pipeline.list_perfusion() == ["Felix"]
    assert torch.equal(generate("a photo of <Felix>"), expected)
    assert differ(generate(CAT), expected)
    saved = PerfusionConcept.load(pipeline.save_perfusion(tmp_path))
    assert saved.placeholder_token == "<Felix>"
    pipeline.load_perfusion([cat, cat], ["b", "c"], placeholder_token=["<b>", None])
    for prompt in ("a photo of <b>", CAT):
        assert torch.equal(generate(prompt), expected)
    pipeline.unload_perfusion()
    untouched.check()


def test_loading_does_not_change_the_given_concept(pipeline, cat, generate):
    before = {name: tensor.clone() for name, tensor in cat._tensors()}
    pipeline.load_perfusion(cat, placeholder_token="<foo>")
    pipeline.set_perfusion(bias=0.1)
    generate("a <foo>")
    assert cat.bias == 0.7
    assert all(torch.equal(tensor, before[name]) for name, tensor in cat._tensors())


def with_width(width):
    return dict.fromkeys(concept_file.VECTORS, torch.ones(width))


def test_a_loaded_concept_does_not_change_with_the_given_one(pipeline, cat, generate):
    pipeline.load_perfusion(cat)
    before = generate(CAT)
    cat.placeholder_token, cat.bias, cat.superclass_input = "<other>", 1.5, -cat.superclass_input
    cat.target_outputs.clear()
    pipeline.set_perfusion()
    assert torch.equal(generate(CAT), before)


BAD = {
    "missing file": (lambda make: "no/such/file", {}, FileNotFoundError | ValueError, "no/such/file"),
    "same name": (lambda make: make("<other>"), {"concept_name": "my-cat"}, ValueError, "concept named 'my-cat' is"),
    "same token": (
        lambda make: make(),
        {"concept_name": "other"},
        ValueError,
        "'<my-cat>' is the placeholder token of a concept",
    ),
    "plain token": (lambda make: make("beach"), {}, ValueError, "'beach' is already a token .*placeholder_token="),
    "plain new token": (
        lambda make: make("<a>"),
        {"placeholder_token": "dog"},
        ValueError,
        "'dog' is already a token",
    ),
    "empty new token": (lambda make: make("<a>"), {"placeholder_token": ""}, ValueError, "placeholder_token is ''"),
    "two new tokens": (
        lambda make: make("<a>"),
        {"placeholder_token": "my cat"},
        ValueError,
        "expected one token without",
    ),
    "foreign state dict": (lambda make: {"lora_A": torch.ones(1)}, {}, ValueError, "not a Perfusion concept"),
    "another UNet's width": (
        lambda make: make("<a>", **with_width(48)),
        {},
        ValueError,
        "'<a>' edits hidden states of width 48, but UNet2DConditionModel .* takes width 32. .*trained on tiny",
    ),
    "another text encoder's width": (
        lambda make: make("<a>", token_embeddings=[torch.ones(48)]),
        {},
        ValueError,
        r"'<a>' has 48 numbers, but those of this text encoder \(CLIPTextModel\) have 32",
    ),
    "other layers": (
        lambda make: make("<a>", target_outputs={"mid_block.attn2": torch.ones(3)}, base_model="pocket"),
        {},
        ValueError,
        r"'<a>' does not have the attention layers of UNet2D.* 4 missing .* 1 unknown .*trained on pocket",
    ),
    "other layer sizes": (
        lambda make: make("<a>", target_outputs=dict.fromkeys(make().target_outputs, torch.ones(20))),
        {},
        ValueError,
        r"output of 20 numbers for down_blocks.0\.\S+, but that layer of UNet2D.* has 16\.",
    ),
    "unknown super-class": (
        lambda make: make("<a>", bad_superclass="<|endoftext|>"),
        {},
        ValueError,
        "does not know the super-class",
    ),
}


@pytest.fixture
def make_bad(make_concept):
    def make(token="<my-cat>", bad_superclass=None, **fields):
        concept = make_concept(token, **fields)
        concept.superclass = bad_superclass or concept.superclass
        return concept

    return make


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("among", [False, True], ids=["alone", "last of a list"])
def test_what_cannot_be_loaded_changes_nothing(pipeline, cat, dog, make_bad, generate, case, among):
    """Neither the concepts that are loaded nor the pipeline, and of a list none is loaded."""
    source, arguments, error, match = BAD[case]
    pipeline.load_perfusion(cat)
    untouched = Untouched(pipeline, generate)
    source = source(make_bad)
    if among:
        source = [dog, source]
        arguments = {name: [None, value] for name, value in arguments.items()}
    with pytest.raises(getattr(error, "__args__", error), match=re.compile(match)):
        pipeline.load_perfusion(source, **arguments)
    assert pipeline.list_perfusion() == pipeline.get_active_perfusion() == ["my-cat"]
    untouched.check()
    pipeline.load_perfusion(dog)
    assert pipeline.list_perfusion() == ["my-cat", "my-dog"]


@pytest.mark.parametrize(
    "case", ["plain token", "another text encoder's width", "unknown super-class", "other layers", "missing file"]
)
def test_a_failed_first_load_leaves_an_ordinary_pipeline(pipeline, dog, make_bad, untouched, case):
    source, arguments, error, match = BAD[case]
    for sources in (source(make_bad), [dog, source(make_bad)]):
        with pytest.raises(getattr(error, "__args__", error), match=re.compile(match)):
            pipeline.load_perfusion(sources, **arguments)
        assert pipeline.list_perfusion() == []
        untouched.check()


def test_names_twice_in_one_list_are_refused(pipeline, make_concept, untouched):
    with pytest.raises(ValueError, match="a concept named 'cat' is loaded already"):
        pipeline.load_perfusion([make_concept("<cat>"), make_concept("<<cat>>", seed=1)])
    with pytest.raises(ValueError, match="'<cat>' is the placeholder token of a concept that is loaded already"):
        pipeline.load_perfusion([make_concept("<cat>"), make_concept("<cat>", seed=1)], ["a", "b"])
    assert pipeline.list_perfusion() == []
    untouched.check()


def test_a_list_of_no_concept_is_refused(pipeline, untouched):
    """Images would be the base model's, say because a pattern of files has found none."""
    with pytest.raises(ValueError, match="the list of concepts to load is empty"):
        pipeline.load_perfusion([])
    untouched.check()


@pytest.mark.parametrize("arguments", [{"concept_name": ["a"]}, {"placeholder_token": ["<a>", "<b>", "<c>"]}])
def test_as_many_names_as_concepts(pipeline, cat, dog, arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))} has \d entries for 2 concepts; expected one each"):
        pipeline.load_perfusion([cat, dog], **arguments)


def test_a_pipeline_without_unet_is_refused(cat):
    pipeline = DiTPipeline(transformer=None, vae=make_vae(AutoencoderKL), scheduler=None)
    kind = type(pipeline)
    with pytest.raises(ValueError, match=r"cannot edit DiTPipeline, whose model is NoneType; .* Cosmos, Stable"):
        add_perfusion(pipeline)
    assert type(pipeline) is kind


def test_before_any_concept_is_loaded(pipeline, tmp_path, untouched):
    assert pipeline.list_perfusion() == pipeline.get_active_perfusion() == []
    pipeline.unload_perfusion()
    calls = {
        "set": lambda: pipeline.set_perfusion("my-cat"),
        "enable": pipeline.enable_perfusion,
        "disable": pipeline.disable_perfusion,
        "save": lambda: pipeline.save_perfusion(tmp_path),
    }
    for action, call in calls.items():
        with pytest.raises(ValueError, match=rf"there is no concept to {action}; load one with load_perfusion"):
            call()
    with pytest.raises(ValueError, match="no concept named 'my-cat' is loaded; loaded are: none"):
        pipeline.delete_perfusion("my-cat")
    untouched.check()


@pytest.mark.parametrize(
    ("trained_on", "here", "warned"),
    [
        ("me/tiny", "you/other", True),
        ("me/tiny", "you/Tiny", False),  # a copy
        ("me/tiny", "tiny-folder", False),
        ("tiny-folder", "me/tiny", False),
        ("", "me/tiny", False),
    ],
)
def test_a_concept_of_another_base_model_is_warned_of(pipeline, make_concept, warnings, trained_on, here, warned):
    pipeline.register_to_config(_name_or_path=here)
    pipeline.load_perfusion(make_concept(base_model=trained_on))
    messages = warnings()
    assert len(messages) == warned
    assert all(f"was trained on {trained_on}, and this pipeline is {here};" in message for message in messages)


# Numbers that a model cannot compute with


def with_large_number(concept, name, number):
    """A concept one of whose tensors, named as in a file, begins with a number."""
    state_dict = concept.state_dict(torch.float32)
    state_dict[name][0] = number
    state_dict["inverse_superclass_input"][0].abs_()  # so that ‖i‖² stays positive
    return PerfusionConcept.from_state_dict(state_dict)


OUTPUT = "target_outputs.mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            OUTPUT,
            r"concept '<my-cat>' holds 7e\+04, which is too large for UNet2D.* in torch.float16; .*trained on tiny",
        ),
        ("superclass_input", r"concept '<my-cat>' holds 7e\+04, which is too large for UNet2D.* in torch.float16"),
        ("token_embeddings.0", r"embedding of '<my-cat>' holds 7e\+04, which is too large for .* in torch.float16"),
    ],
)
def test_numbers_beyond_half_precision_are_refused_by_a_model_in_it(pipeline, cat, name, match):
    large = with_large_number(cat, name, 7e4)
    for dtype in (torch.float32, torch.bfloat16):
        pipeline.to(dtype)
        pipeline.load_perfusion(large)
        pipeline.unload_perfusion()
    pipeline.to(torch.float16)
    with pytest.raises(ValueError, match=match):
        pipeline.load_perfusion(large)
    assert pipeline.list_perfusion() == []
    pipeline.load_perfusion(cat)


def test_a_concept_that_makes_the_model_return_nan_is_named(pipeline, cat, dog, generate):
    """The pipeline was moved to half precision after the concept was loaded."""
    pipeline.load_perfusion([with_large_number(cat, OUTPUT, 7e4), dog])
    generate(CAT)
    pipeline.to(torch.float16)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"with '<my-cat>' the model returns NaN or infinity in torch.float16; if"
        ):
            generate(CAT)
    assert generate(DOG).isfinite().all()
    pipeline.disable_perfusion()
    assert generate(CAT).isfinite().all()
    pipeline.enable_perfusion()
    embeddings = pipeline.encode_prompt(CAT, "cpu", 1, False)[0]
    for _ in range(2):
        with pytest.raises(ValueError, match="with '<my-cat>' the model returns NaN"), torch.no_grad():
            pipeline.unet(torch.zeros(1, 4, 8, 8).half(), 1, embeddings)


def test_the_output_of_a_model_is_checked_once_for_a_batch(pipeline, cat, generate, monkeypatch):
    """An accelerator would be waited for at every step."""
    isfinite, calls = torch.Tensor.isfinite, []
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: calls.append(1) or isfinite(tensor))
    pipeline.load_perfusion(cat)
    for steps, guidance_scale in ((3, 4.0), (5, 1.0)):
        generate(CAT, num_inference_steps=steps, guidance_scale=guidance_scale)
        assert len(calls) == 1
        calls.clear()
    generate("a cat")
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hostile_numbers_give_a_finite_image_or_an_error(pipeline, cat, generate, dtype):
    rng = random.Random(0)
    pipeline.to(dtype)
    refused = 0
    for _ in range(40):
        state_dict = cat.state_dict(torch.float32)
        names = [name for name, value in state_dict.items() if isinstance(value, torch.Tensor)]
        for name in rng.sample(names, rng.choice([1, 2, len(names)])):
            size = 10 ** rng.uniform(-44, 38.4)
            state_dict[name] = rng.choice([state_dict[name] * size, torch.full_like(state_dict[name], size)])
        try:
            pipeline.load_perfusion(state_dict)
            pipeline.set_perfusion(bias=rng.choice([0, 0.7, 2]), temperature=rng.choice([0.01, 0.15, 1]))
            assert generate(CAT).isfinite().all()
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
        pipeline.unload_perfusion()
    assert 10 < refused < 40


# Settings


def test_defaults_come_from_the_concept(pipeline, make_concept):
    fields = {"bias": 0.61, "temperature": 0.12}, {"bias": 0.7, "temperature": 0.15}
    pipeline.load_perfusion([make_concept(f"<{n}>", seed=n, **given) for n, given in enumerate(fields)], ["a", "b"])
    assert settings(pipeline) == {"a": (0.61, 0.12), "b": (0.7, 0.15)}
    pipeline.set_perfusion(bias=0.4, temperature=0.2)
    assert settings(pipeline) == {"a": (0.4, 0.2), "b": (0.4, 0.2)}
    pipeline.set_perfusion(locking="global")  # what is not given stays
    assert settings(pipeline) == {"a": (0.4, 0.2), "b": (0.4, 0.2)}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (0.5, (0.5, 0.5)),
        (1, (1.0, 1.0)),
        ([0.4, 0.6], (0.4, 0.6)),
        ((0.4, 0.6), (0.4, 0.6)),
        ({"b": 0.6, "a": 0.4}, (0.4, 0.6)),
        ({"b": 0.6}, (0.7, 0.6)),
        (None, (0.7, 0.7)),
    ],
)
def test_settings_are_one_for_all_one_each_or_by_name(pipeline, cat, dog, bias, expected):
    pipeline.load_perfusion([cat, dog], ["a", "b"])
    pipeline.set_perfusion(["a", "b"], bias=bias)
    assert settings(pipeline) == {"a": (expected[0], 0.15), "b": (expected[1], 0.15)}
    pipeline.set_perfusion(["b", "a"], temperature=[0.3, 0.2])
    assert settings(pipeline) == {"a": (expected[0], 0.2), "b": (expected[1], 0.3)}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"names": "cow"}, "no concept named 'cow' is loaded; loaded are: my-cat, my-dog"),
        ({"names": ["my-cat", "cow"]}, "no concept named 'cow'"),
        ({"bias": -0.1}, "bias is -0.1; expected a number from 0.0 to 2.0"),
        ({"bias": [0.5, 2.5]}, "bias is 2.5"),
        ({"bias": float("nan")}, "bias is nan"),
        ({"bias": True}, "bias is True"),
        ({"bias": "0.5"}, "bias is '0.5'"),
        ({"bias": [0.5]}, "bias has 1 numbers for 2 concepts"),
        ({"bias": {"cow": 0.5}}, "bias is given for cow; expected only my-cat, my-dog"),
        ({"names": "my-cat", "bias": {"my-dog": 0.5}}, "bias is given for my-dog; expected only my-cat"),
        ({"temperature": 0}, "temperature is 0; expected a number from 0.01 to 1.0"),
        ({"temperature": {"my-dog": 7}}, "temperature is 7"),
        ({"temperature": [0.1, 0.2, 0.3]}, "temperature has 3 numbers for 2"),
        ({"locking": "none"}, "locking is 'none'; expected one of local, global"),
    ],
)
def test_bad_settings_change_nothing(pipeline, cat, dog, arguments, match):
    pipeline.load_perfusion([cat, dog])
    pipeline.set_perfusion(["my-cat", "my-dog"], bias=0.6, temperature=0.3, locking="global")
    with pytest.raises(ValueError, match=match):
        pipeline.set_perfusion(**({"bias": 0.5, "temperature": 0.2, "locking": "local"} | arguments))
    assert settings(pipeline) == {"my-cat": (0.6, 0.3), "my-dog": (0.6, 0.3)}
    assert pipeline.get_active_perfusion() == ["my-cat", "my-dog"]
    assert registry_of(pipeline.unet).locking == "global"


def test_bias_temperature_and_locking_each_change_the_image(pipeline, cat, generate):
    pipeline.load_perfusion(cat)
    images = []
    for arguments in ({}, {"bias": 0.3}, {"temperature": 0.8}, {"locking": "global"}, {"bias": 2}):
        with pipeline.set_perfusion(**arguments):
            images.append(generate(CAT))
    for n, image in enumerate(images):
        assert all(differ(image, other) for other in images[:n])
    assert torch.equal(generate(CAT), images[0])


def test_only_the_chosen_concepts_edit(pipeline, cat, dog, generate):
    pipeline.load_perfusion(cat)
    only_cat = generate(CAT)
    pipeline.load_perfusion(dog)
    with_dog = generate(DOG)
    pipeline.set_perfusion("my-cat")
    assert pipeline.get_active_perfusion() == ["my-cat"]
    assert pipeline.list_perfusion() == ["my-cat", "my-dog"]
    assert torch.equal(generate(CAT), only_cat)
    assert differ(generate(DOG), with_dog)
    pipeline.set_perfusion([])
    assert pipeline.get_active_perfusion() == []
    assert differ(generate(CAT), only_cat)
    pipeline.set_perfusion(["my-dog", "my-cat", "my-dog"])
    assert pipeline.get_active_perfusion() == ["my-dog", "my-cat"]
    assert torch.equal(generate(DOG), with_dog)


def test_settings_for_the_body_of_a_with_statement(pipeline, cat, dog, generate):
    pipeline.load_perfusion([cat, dog])
    pipeline.set_perfusion("my-cat", bias=0.6)
    before = generate(CAT)
    with pipeline.set_perfusion("my-dog", bias=0.3, temperature=0.5, locking="global"):
        assert settings(pipeline)["my-dog"] == (0.3, 0.5)
        assert pipeline.get_active_perfusion() == ["my-dog"]
        with pytest.raises(KeyboardInterrupt), pipeline.set_perfusion(["my-cat", "my-dog"], bias=[0.1, 0.2]):
            assert settings(pipeline) == {"my-cat": (0.1, 0.15), "my-dog": (0.2, 0.5)}
            raise KeyboardInterrupt
        assert settings(pipeline)["my-dog"] == (0.3, 0.5)
        assert differ(generate(CAT), before)
    assert pipeline.get_active_perfusion() == ["my-cat"]
    assert settings(pipeline) == {"my-cat": (0.6, 0.15), "my-dog": (0.7, 0.15)}
    assert registry_of(pipeline.unet).locking == "local"
    assert torch.equal(generate(CAT), before)


def test_a_with_statement_survives_that_concepts_are_deleted_in_it(pipeline, cat, dog):
    pipeline.load_perfusion([cat, dog])
    with pipeline.set_perfusion("my-dog", bias=0.3):
        pipeline.delete_perfusion("my-cat")
    assert pipeline.get_active_perfusion() == ["my-dog"]
    assert settings(pipeline) == {"my-dog": (0.7, 0.15)}
    with pipeline.set_perfusion(bias=0.3):
        pipeline.unload_perfusion()
    assert pipeline.list_perfusion() == []


# On, off and away


def test_disabled_concepts_leave_the_very_images(pipeline, cat, generate):
    bare = generate(PROMPTS)
    pipeline.load_perfusion(cat)
    edited = generate(PROMPTS)
    for _ in range(2):
        pipeline.disable_perfusion()
        pipeline.disable_perfusion()
        assert torch.equal(generate(PROMPTS), bare)
        assert pipeline.get_active_perfusion() == []
        assert pipeline.list_perfusion() == ["my-cat"]
        pipeline.enable_perfusion()
        pipeline.enable_perfusion()
        assert torch.equal(generate(PROMPTS), edited)
        assert pipeline.get_active_perfusion() == ["my-cat"]


def test_a_concept_loaded_while_disabled_waits(pipeline, cat, dog, generate, warnings):
    bare = generate([*PROMPTS, DOG])
    pipeline.load_perfusion(cat)
    pipeline.disable_perfusion()
    pipeline.load_perfusion(dog)
    assert any("'my-dog' takes effect after enable_perfusion()" in message for message in warnings())
    pipeline.set_perfusion(bias=0.4)
    assert any("disabled" in message and "enable_perfusion()" in message for message in warnings())
    assert torch.equal(generate([*PROMPTS, DOG]), bare)
    pipeline.enable_perfusion()
    assert pipeline.get_active_perfusion() == ["my-cat", "my-dog"]
    assert differ(generate([PROMPTS[0], DOG]), bare[[0, 2]])


def test_unload_leaves_an_ordinary_pipeline(pipeline, cat, dog, generate, untouched):
    for _ in range(2):
        pipeline.load_perfusion([cat, dog])
        pipeline.set_perfusion(locking="global")
        generate(BOTH)
        pipeline.unload_perfusion()
        pipeline.unload_perfusion()
        assert pipeline.list_perfusion() == []
        untouched.check()


def test_unload_while_disabled(pipeline, cat, untouched):
    pipeline.load_perfusion(cat)
    pipeline.disable_perfusion()
    pipeline.unload_perfusion()
    untouched.check()


def test_delete_leaves_the_others(pipeline, cat, dog, generate, untouched):
    pipeline.load_perfusion(dog)
    only_dog = generate([CAT, DOG])
    pipeline.load_perfusion(cat)
    pipeline.delete_perfusion("my-cat")
    assert pipeline.list_perfusion() == pipeline.get_active_perfusion() == ["my-dog"]
    assert torch.equal(generate([CAT, DOG]), only_dog)
    pipeline.load_perfusion(cat)
    with pytest.raises(ValueError, match="no concept named 'cow' is loaded; loaded are: my-dog, my-cat"):
        pipeline.delete_perfusion(["my-cat", "cow"])
    assert pipeline.list_perfusion() == ["my-dog", "my-cat"]
    pipeline.delete_perfusion(["my-cat", "my-dog", "my-cat"])
    assert pipeline.list_perfusion() == []
    untouched.check()


def test_a_deleted_name_and_token_can_be_used_again(pipeline, cat, make_concept, generate):
    pipeline.load_perfusion(cat)
    before = generate(CAT)
    pipeline.delete_perfusion("my-cat")
    pipeline.load_perfusion(make_concept(seed=5))
    assert differ(generate(CAT), before)
    pipeline.delete_perfusion("my-cat")
    pipeline.load_perfusion(cat)
    assert torch.equal(generate(CAT), before)


def test_a_prompt_with_a_concept_that_is_not_active_is_warned_of(pipeline, cat, dog, generate, warnings):
    pipeline.load_perfusion([cat, dog])
    pipeline.set_perfusion("my-dog")
    generate([DOG, PROMPTS[1]])
    assert not warnings()
    generate(CAT)
    (message,) = warnings()
    assert "<my-cat> in a prompt is not active" in message and "set_perfusion()" in message


def test_replaced_processors_stop_the_image_until_enabled_again(pipeline, cat, generate):
    """enable_attention_slicing, xformers and load_ip_adapter replace processors and say nothing."""
    pipeline.load_perfusion(cat)
    before = generate(PROMPTS)
    pipeline.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(
        RuntimeError, match=r"replaced after concepts were loaded .*AttnProcessor.*enable_perfusion\(\)"
    ):
        generate(PROMPTS)
    pipeline.enable_perfusion()
    assert close(generate(PROMPTS), before)
    pipeline.enable_attention_slicing(1)
    pipeline.enable_perfusion()
    assert close(generate(PROMPTS), before)
    pipeline.unload_perfusion()
    assert not any(isinstance(p, PerfusionAttnProcessor) for p in pipeline.unet.attn_processors.values())


def test_attention_slicing_before_loading(pipeline, cat, generate):
    pipeline.load_perfusion(cat)
    expected = generate(PROMPTS)
    pipeline.unload_perfusion()
    pipeline.enable_attention_slicing(1)
    pipeline.load_perfusion(cat)
    assert close(generate(PROMPTS), expected)


# Saving


def test_a_saved_concept_gives_the_same_image_elsewhere(pipeline, cat, dog, generate, tmp_path):
    """Also when its settings were changed here: those are the pipeline's, the defaults the concept's."""
    pipeline.load_perfusion([cat.to(torch.float16), dog])
    before = generate(CAT)
    pipeline.set_perfusion(bias=0.2)
    path = pipeline.save_perfusion(tmp_path / "new", "my-cat")
    assert path == tmp_path / "new" / WEIGHT_NAME
    pipeline.unload_perfusion()
    pipeline.load_perfusion(tmp_path / "new")
    assert close(generate(CAT), before)
    again = pipeline.save_perfusion(tmp_path, weight_name="cat.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_which_concept_to_save(pipeline, cat, dog, tmp_path):
    pipeline.load_perfusion([cat, dog])
    with pytest.raises(ValueError, match="several concepts are loaded; name one of my-cat, my-dog"):
        pipeline.save_perfusion(tmp_path)
    with pytest.raises(ValueError, match="no concept named 'cow'"):
        pipeline.save_perfusion(tmp_path, "cow")
    assert PerfusionConcept.load(pipeline.save_perfusion(tmp_path, "my-dog")).superclass == "dog"
    with pytest.raises(ValueError, match="is the concept <my-dog>; choose another folder or name for <my-cat>"):
        pipeline.save_perfusion(tmp_path, "my-cat")
    pipeline.save_perfusion(tmp_path, "my-dog")


# Pictures


def test_two_concepts_in_one_prompt_both_have_an_effect(pipeline, cat, dog, generate):
    pipeline.load_perfusion([cat, dog])
    both = generate(BOTH)
    for name in ("my-cat", "my-dog"):
        with pipeline.set_perfusion(name):
            assert differ(generate(BOTH), both)
    pipeline.unload_perfusion()
    pipeline.load_perfusion([dog, cat])
    assert close(generate(BOTH), both)
    pipeline.set_perfusion(["my-cat", "my-dog"])
    assert close(generate(BOTH), both)


@pytest.mark.parametrize("locking", ["local", "global"])
def test_a_batch_gives_the_images_of_single_runs(pipeline, cat, dog, generate, locking):
    pipeline.load_perfusion([cat, dog])
    pipeline.set_perfusion(locking=locking)
    prompts = [CAT, "a beach", BOTH, DOG, CAT]
    assert close(generate(prompts), torch.cat([generate(prompt) for prompt in prompts]))


def test_several_images_of_a_prompt(pipeline, cat, generate):
    pipeline.load_perfusion(cat)
    generators = [torch.Generator().manual_seed(7) for _ in range(4)]
    images = generate([CAT, "a beach"], num_images_per_prompt=2, generator=generators)
    assert close(images, torch.cat([generate(CAT), generate(CAT), generate("a beach"), generate("a beach")]))


@pytest.mark.parametrize("locking", ["local", "global"])
def test_embeddings_made_earlier(pipeline, cat, generate, locking):
    bare = generate(CAT)
    pipeline.load_perfusion(cat)
    pipeline.set_perfusion(locking=locking)
    expected = generate(CAT)
    positive, negative = pipeline.encode_prompt(CAT, "cpu", 1, True)
    generate(PROMPTS)
    embeddings = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(generate(CAT, prompt=None, **embeddings), expected)
    assert torch.equal(generate(CAT, prompt=None, **{k: e.clone() for k, e in embeddings.items()}), expected)
    pipeline.disable_perfusion()
    assert differ(generate(CAT, prompt=None, **embeddings), expected)
    assert torch.equal(generate(CAT), bare)


def test_embeddings_made_before_the_locking_was_changed(pipeline, cat, generate):
    pipeline.load_perfusion(cat)
    positive, negative = pipeline.encode_prompt(CAT, "cpu", 1, True)
    pipeline.set_perfusion(locking="global")
    expected = generate(CAT)
    assert torch.equal(generate(CAT, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative), expected)


def test_embeddings_that_were_changed_on_the_way_are_warned_of(pipeline, cat, generate, warnings):
    """Prompt weighting would lose the concept without a token."""
    pipeline.load_perfusion(cat)
    positive, negative = pipeline.encode_prompt(CAT, "cpu", 1, True)
    generate(CAT, prompt=None, prompt_embeds=positive * 1.1, negative_prompt_embeds=negative)
    (message,) = warnings()
    assert "does not recognise 1 of 2 prompt embeddings" in message and "mark_perfusion" in message


def test_embeddings_of_ones_own_are_known_once_they_are_marked(pipeline, cat, dog, generate, warnings):
    pipeline.load_perfusion([cat, dog])
    positive, negative = pipeline.encode_prompt("a <my-cat> on a <my-dog>", "cpu", 1, True)
    embeddings = {"prompt": None, "prompt_embeds": positive * 1.01, "negative_prompt_embeds": negative}
    bare = generate(CAT, **embeddings)
    assert len(warnings()) == 1
    generated = {}
    for names in ("my-cat", "my-dog", None):
        pipeline.mark_perfusion(embeddings["prompt_embeds"], names)
        generated[names] = generate(CAT, **embeddings)
    assert [message[:36] for message in warnings()] == ["Nobody knows where the tokens of 'my"] * 3
    assert all(differ(one, other) for one, other in itertools.combinations((bare, *generated.values()), 2))
    pipeline.set_perfusion(locking="global")
    with pytest.raises(ValueError, match=r"nobody knows that of 1 prompt embeddings.*locking='local'"):
        generate(CAT, **embeddings)
    with pytest.raises(ValueError, match="no concept named 'my-cow' is loaded"):
        pipeline.mark_perfusion(positive, "my-cow")
    for other in (positive[0], positive[..., :-1]):
        with pytest.raises(ValueError, match=r"prompt_embeds has shape .*; expected \(batch, length, 32\)"):
            pipeline.mark_perfusion(other)


def test_marked_embeddings_may_come_with_the_positions_of_their_tokens(pipeline, cat, dog, generate):
    pipeline.load_perfusion([cat, dog])
    prompt = "a <my-cat> on a <my-dog>"
    expected = generate(prompt)
    places = {name: places_of(pipeline.tokenizer, prompt, f"<{name}>") for name in ("my-cat", "my-dog")}
    positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True)
    embeddings = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    pipeline.mark_perfusion(positive, places)
    assert torch.equal(generate(prompt, **embeddings), expected)
    pipeline.mark_perfusion(positive, {name: place for name, (place,) in places.items()})
    assert torch.equal(generate(prompt, **embeddings), expected)
    pipeline.mark_perfusion(positive, {name: [5 + place] for name, (place,) in places.items()})
    assert differ(generate(prompt, **embeddings), expected)
    for place in (-1, LENGTH, 1.5):
        message = rf"position {place} of 'my-dog' is not in prompt_embeds; expected 0 to {LENGTH - 1}"
        with pytest.raises(ValueError, match=message):
            pipeline.mark_perfusion(positive, {"my-cat": [1], "my-dog": [2, place]})
    with pytest.raises(ValueError, match="position 2 is given for 'my-cat' and 'my-dog'"):
        pipeline.mark_perfusion(positive, {"my-cat": [1, 2], "my-dog": [2]})


def test_without_guidance(pipeline, cat, generate):
    bare = generate(PROMPTS, guidance_scale=1.0)
    pipeline.load_perfusion(cat)
    edited = generate(PROMPTS, guidance_scale=1.0)
    assert torch.equal(edited[1], bare[1])
    assert differ(edited[:1], bare[:1])


def test_a_token_in_the_negative_prompt_is_a_concept_too(pipeline, cat, generate):
    bare = generate("a beach", negative_prompt=["a <my-cat>"])
    pipeline.load_perfusion(cat)
    edited = generate("a beach", negative_prompt=["a <my-cat>"])
    assert differ(edited, bare)
    pipeline.set_perfusion(bias=0.3)
    assert differ(generate("a beach", negative_prompt=["a <my-cat>"]), edited)


@pytest.mark.parametrize(
    "change", [lambda pipe: pipe.disable_perfusion(), lambda pipe: pipe.set_perfusion(bias=1.5, temperature=0.5)]
)
def test_a_callback_may_change_settings_midway(pipeline, cat, generate, change):
    def on_step_end(pipe, step, timestep, arguments, at):
        if step == at:
            change(pipe)
        return arguments

    bare = generate(CAT)
    pipeline.load_perfusion(cat)
    edited = generate(CAT)
    midway = generate(CAT, callback_on_step_end=partial(on_step_end, at=0))
    assert not any(torch.allclose(midway, other, atol=1e-3) for other in (bare, edited, generate(CAT)))
    pipeline.enable_perfusion()
    pipeline.set_perfusion(bias=cat.bias, temperature=cat.temperature)
    assert torch.equal(generate(CAT, callback_on_step_end=partial(on_step_end, at=2)), edited)  # after the last step


def test_a_lora_before_or_after_gives_the_same_image(pipeline, cat, generate):
    from peft import LoraConfig

    def add_lora():
        torch.manual_seed(0)
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False))

    pipeline.load_perfusion(cat)
    without = generate(PROMPTS)
    add_lora()
    after = generate(PROMPTS)
    assert differ(after, without)
    pipeline.unet.delete_adapters("default")
    assert close(generate(PROMPTS), without)
    pipeline.unload_perfusion()
    add_lora()
    pipeline.load_perfusion(cat)
    assert close(generate(PROMPTS), after)


# Other pipelines


def test_concepts_belong_to_the_unet_that_pipelines_share(pipeline, plain_pipeline, cat, generate, untouched):
    pipeline.load_perfusion(cat)
    other = add_perfusion(plain_pipeline)
    assert other.unet is pipeline.unet
    assert other.list_perfusion() == ["my-cat"]
    other.set_perfusion(bias=0.3)
    assert settings(pipeline) == {"my-cat": (0.3, 0.15)}
    assert torch.equal(generate(CAT, other), generate(CAT))
    other.unload_perfusion()
    untouched.check()


def test_concepts_do_not_leak_to_a_pipeline_of_another_unet(pipeline, components, cat, generate):
    other = PerfusionPipeline(**{**components, "unet": make_unet(seed=1)})
    other.set_progress_bar_config(disable=True)
    pipeline.load_perfusion(cat)
    assert other.list_perfusion() == []
    pipeline.unload_perfusion()
    other.load_perfusion(cat)
    assert pipeline.list_perfusion() == []


@pytest.mark.parametrize("name", ["unet", "text_encoder", "tokenizer"])
def test_another_model_is_refused_while_concepts_are_on_the_one_there_is(pipeline, cat, untouched, name):
    other = copy.deepcopy(getattr(pipeline, name))
    pipeline.load_perfusion(cat)
    with pytest.raises(ValueError, match=f"would stay with its {name}; call unload_perfusion"):
        setattr(pipeline, name, other)
    setattr(pipeline, name, getattr(pipeline, name))
    pipeline.unload_perfusion()
    untouched.check()
    setattr(pipeline, name, other)
    pipeline.load_perfusion(cat)
    assert pipeline.list_perfusion() == ["my-cat"]


def test_a_unet_in_its_compiled_form(pipeline, cat, generate, untouched):
    pipeline.load_perfusion(cat)
    expected = generate(PROMPTS)
    pipeline.unload_perfusion()
    unet = pipeline.unet
    pipeline.unet = torch.compile(unet, backend="eager")
    pipeline.load_perfusion(cat)
    assert close(generate(PROMPTS), expected)
    pipeline.unload_perfusion()
    assert differ(generate(CAT), expected[:1])
    pipeline.unet = unet
    untouched.check()


@pytest.mark.parametrize("locking", ["local", "global"])
def test_image_to_image(components, cat, generate, locking):
    pipe = StableDiffusionImg2ImgPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    bare = generate(PROMPTS, pipe, image=image, strength=0.9)
    add_perfusion(pipe).load_perfusion(cat)
    pipe.set_perfusion(locking=locking)
    edited = generate(PROMPTS, pipe, image=image, strength=0.9)
    assert torch.equal(edited[1], bare[1])
    assert differ(edited[:1], bare[:1])
    assert isinstance(pipe, StableDiffusionImg2ImgPipeline)
    pipe.unload_perfusion()
    assert torch.equal(generate(PROMPTS, pipe, image=image, strength=0.9), bare)
