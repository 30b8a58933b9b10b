"""The edit inside a UNet: the right keys and values, over any processor and projection."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import LENGTH, WIDTH, expected_gates, random_concept
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from peft import LoraConfig

from diffusers_perfusion.attention_processor import (
    ContentGate,
    Edit,
    PerfusionAttnProcessor,
    attn_processors,
    check_concept_fits,
    wrap,
)
from diffusers_perfusion.model_families import cross_attention_layers

PROCESSORS = {
    "AttnProcessor": AttnProcessor,
    "AttnProcessor2_0": AttnProcessor2_0,
    "SlicedAttnProcessor": lambda: SlicedAttnProcessor(1),
}
NAMES = pytest.mark.parametrize("names", [["my-cat"], ["my-cat", "my-dog"]], ids=len)


@pytest.fixture
def unet(components):
    return components["unet"].requires_grad_(False)


@pytest.fixture
def concepts_of(make_concept):
    """Make a random concept of each name."""
    return lambda *names, **fields: [make_concept(f"<{name}>", seed=n, **fields) for n, name in enumerate(names)]


def encodings(seed=0):
    """Hidden states of a prompt without and a prompt with tokens, as guidance has them in one batch."""
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def edit_of(concepts, hidden_states=None, **fields):
    """The edit of concepts in the last row of `encodings()`."""
    hidden_states = encodings() if hidden_states is None else hidden_states
    rows = [expected_gates(row, *concepts) for row in hidden_states]
    coef, gate = (torch.stack(parts) for parts in zip(*rows, strict=True))
    held = torch.tensor([0.0, 1.0])[:, None, None]
    superclass_input = torch.stack([concept.superclass_input.float() for concept in concepts])
    return Edit(tuple(concepts), superclass_input, coef, gate * held, **fields)


class Source:
    """Gives every layer one edit."""

    def __init__(self, edit=None):
        self.edit = edit

    def edit_for(self, hidden_states, layer):
        return self.edit


def wrap_all(unet, source):
    for name, layer in cross_attention_layers(unet).items():
        layer.set_processor(wrap(layer.processor, (), name, source))


@torch.no_grad()
def predict(unet, e=None, **arguments):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return unet(latents, 500, encodings() if e is None else e, **arguments).sample


class Recorder:
    """A processor of somebody else's that keeps the keys and values it works with."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        self.key, self.value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def record(unet):
    """Put a recorder on each cross-attention layer."""
    recorders = {name: Recorder() for name in cross_attention_layers(unet)}
    for name, layer in cross_attention_layers(unet).items():
        layer.set_processor(recorders[name])
    return recorders


def edited(e, weight, concepts, outputs):
    """`W e + Σ_j gate_j (o_j − coef_j W i_j)` in float64, for hidden states `(length, d)`."""
    coefs, gates = (part.double() for part in expected_gates(e, *concepts))
    weight = weight.double()
    h = e.double() @ weight.T
    for concept, o, coef, gate in zip(concepts, outputs, coefs.T, gates.T, strict=True):
        removed = coef[:, None] * (weight @ concept.superclass_input.double())
        h = h + gate[:, None] * (o.double() - removed)
    return h.float()


def check_keys_and_values(recorders, concepts, key_weights, value_weights, bias=0.0):
    """Compare what the recorders hold of `encodings()` with the edit under local key-locking."""
    for name, recorder in recorders.items():
        w_k, w_v = key_weights[name], value_weights[name]
        key = edited(encodings()[1], w_k, concepts, [w_k @ concept.superclass_input for concept in concepts])
        value = edited(encodings()[1], w_v, concepts, [concept.target_outputs[name] for concept in concepts])
        for got, wanted, weight in ((recorder.key, key, w_k), (recorder.value, value, w_v)):
            torch.testing.assert_close(got[1], wanted + bias, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(got[0], encodings()[0] @ weight.T + bias, atol=2e-5, rtol=1e-4)
            # The test would see it if nothing were edited.
            assert not torch.allclose(got[1], encodings()[1] @ weight.T + bias, atol=1e-2)


def weights(unet, projection):
    return {name: getattr(layer, projection).weight for name, layer in cross_attention_layers(unet).items()}


# The right keys and values


@NAMES
def test_keys_and_values_are_edited_with_locked_keys(unet, concepts_of, names):
    concepts, recorders = concepts_of(*names), record(unet)
    wrap_all(unet, Source(edit_of(concepts)))
    predict(unet)
    check_keys_and_values(recorders, concepts, weights(unet, "to_k"), weights(unet, "to_v"))


@NAMES
def test_layers_project_the_faded_hidden_states(unet, concepts_of, names):
    edit, recorders = edit_of(concepts_of(*names)), record(unet)
    source = Source(edit)
    wrap_all(unet, source)
    predict(unet, encodings(5))
    expected = {name: (recorder.key, recorder.value) for name, recorder in recorders.items()}
    source.edit = replace(edit, inputs=encodings(5))
    predict(unet)
    assert all(torch.equal(recorders[name].key, key) for name, (key, _) in expected.items())
    assert all(torch.equal(recorders[name].value, value) for name, (_, value) in expected.items())


@NAMES
def test_global_key_locking_takes_all_keys_from_the_superclass_prompt(unet, concepts_of, names):
    concepts, recorders = concepts_of(*names), record(unet)
    superclass_prompt = torch.stack([encodings()[0], encodings(5)[1]])
    wrap_all(unet, Source(edit_of(concepts, superclass_prompt=superclass_prompt)))
    predict(unet)
    for name, layer in cross_attention_layers(unet).items():
        assert torch.equal(recorders[name].key, layer.to_k(superclass_prompt))
        assert torch.equal(recorders[name].key[0], layer.to_k(encodings())[0])
        outputs = [concept.target_outputs[name] for concept in concepts]
        value = edited(encodings()[1], layer.to_v.weight, concepts, outputs)
        torch.testing.assert_close(recorders[name].value[1], value, atol=2e-5, rtol=1e-4)


def test_projections_with_a_bias_keep_it_once(unet, concepts_of):
    concepts, recorders = concepts_of("my-cat", "my-dog"), record(unet)
    for layer in cross_attention_layers(unet).values():
        for name in ("to_k", "to_v"):
            weight = getattr(layer, name).weight
            projection = torch.nn.Linear(*reversed(weight.shape))
            projection.weight.data, projection.bias.data = weight, torch.full((len(weight),), 3.0)
            setattr(layer, name, projection.requires_grad_(False))
    wrap_all(unet, Source(edit_of(concepts)))
    predict(unet)
    check_keys_and_values(recorders, concepts, weights(unet, "to_k"), weights(unet, "to_v"), 3.0)


@pytest.mark.parametrize("before", [True, False])
def test_a_lora_is_part_of_the_edited_projections(unet, concepts_of, before):
    concepts, recorders = concepts_of("my-cat", "my-dog"), record(unet)
    if not before:
        wrap_all(unet, Source(edit_of(concepts)))
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "to_v"], init_lora_weights=False))
    if before:
        wrap_all(unet, Source(edit_of(concepts)))
    predict(unet)
    merged = {
        projection: {
            name: (module := getattr(layer, projection)).base_layer.weight + module.get_delta_weight("default")
            for name, layer in cross_attention_layers(unet).items()
        }
        for projection in ("to_k", "to_v")
    }
    for name, layer in cross_attention_layers(unet).items():
        assert not torch.allclose(merged["to_k"][name], layer.to_k.base_layer.weight, atol=1e-2)
    check_keys_and_values(recorders, concepts, merged["to_k"], merged["to_v"])


def test_projections_are_called_and_not_read(unet, concepts_of):
    """An offloaded or quantised layer has no weight to read; its module is called."""

    class Hidden(torch.nn.Module):
        def __init__(self, projection):
            super().__init__()
            self.run = [projection]  # out of sight

        def forward(self, inputs):
            return self.run[0](inputs)

    wrap_all(unet, Source(edit_of(concepts_of("my-cat"))))
    expected = predict(unet)
    for layer in cross_attention_layers(unet).values():
        layer.to_k, layer.to_v = Hidden(layer.to_k), Hidden(layer.to_v)
    assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("locking", ["local", "global"])
def test_half_precision_models_are_edited(unet, concepts_of, dtype, locking):
    recorders = record(unet)
    superclass_prompt = encodings(5) if locking == "global" else None
    wrap_all(unet, Source(edit_of(concepts_of("my-cat", "my-dog"), superclass_prompt=superclass_prompt)))
    predict(unet)
    exact = {name: (recorder.key, recorder.value) for name, recorder in recorders.items()}
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert unet.to(dtype)(sample.to(dtype), 500, encodings().to(dtype)).sample.dtype == dtype
    for name, recorder in recorders.items():
        for got, wanted in zip((recorder.key, recorder.value), exact[name], strict=True):
            assert got.dtype == dtype
            assert (got.float() - wanted).norm() < 0.02 * wanted.norm()


def test_a_concept_in_half_precision_is_edited_under_autocast(unet, concepts_of):
    concepts = concepts_of("my-cat", bias=0.1)
    for output in concepts[0].target_outputs.values():
        output.mul_(5)  # so that the edit is far above the rounding
    source = Source(edit_of(concepts))
    wrap_all(unet, source)
    with torch.autocast("cpu", torch.bfloat16):
        exact = predict(unet)
        source.edit = edit_of([concept.to(torch.float16) for concept in concepts])
        stored = predict(unet)
        source.edit = None
        plain = predict(unet)
    assert (stored - exact).norm() < 0.2 * (exact - plain).norm()


def test_gradients_reach_the_concept_and_the_hidden_states_alone(unet, concepts_of):
    (concept,) = concepts_of("my-cat")
    outputs = [output.requires_grad_() for output in concept.target_outputs.values()]
    e = encodings().requires_grad_()
    wrap_all(unet, Source(edit_of([concept], e)))
    unet(torch.randn(2, 4, 8, 8), 500, e).sample.square().mean().backward()
    assert all(output.grad.any() for output in outputs)
    assert e.grad[1].any()
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_gradient_of_a_target_output_is_its_gate(unet, concepts_of):
    concepts, recorders = concepts_of("my-cat", "my-dog"), record(unet)
    for concept in concepts:
        for output in concept.target_outputs.values():
            output.requires_grad_()
    edit = edit_of(concepts)
    wrap_all(unet, Source(edit))
    unet(torch.randn(2, 4, 8, 8), 500, encodings())
    sum(recorder.value.sum() for recorder in recorders.values()).backward()
    for total, concept in zip(edit.gate.sum((0, 1)), concepts, strict=True):
        for output in concept.target_outputs.values():
            torch.testing.assert_close(output.grad, total.expand_as(output))


# Models that repeat rows


@pytest.mark.parametrize("superclass_prompt", [None, encodings(5)])
def test_rows_that_the_model_repeats_are_edited_as_themselves(unet, concepts_of, superclass_prompt):
    layer = next(iter(cross_attention_layers(unet).values()))
    name = next(iter(cross_attention_layers(unet)))
    edit = edit_of(concepts_of("my-cat"), superclass_prompt=superclass_prompt, repeats_rows=True)
    layer.set_processor(wrap(layer.processor, (), name, Source(edit)))
    frames = torch.randn(6, 64, layer.query_dim)
    expected = torch.stack([layer(frames[n::3], encodings()) for n in range(3)], 1).flatten(0, 1)
    repeated = layer(frames, encodings().repeat_interleave(3, 0))
    torch.testing.assert_close(repeated, expected, atol=1e-5, rtol=1e-4)


def test_rows_are_repeated_in_a_row(concepts_of):
    edit = edit_of(concepts_of("my-cat"), repeats_rows=True)
    rows = torch.arange(2.0)[:, None, None]
    assert edit.repeated(rows, 2) is rows
    assert edit.repeated(rows, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("batch", "repeats_rows"), [(4, False), (3, True), (1, True)])
def test_a_batch_of_rows_that_nobody_can_tell_is_an_error(concepts_of, batch, repeats_rows):
    edit = edit_of(concepts_of("my-cat"), repeats_rows=repeats_rows)
    with pytest.raises(RuntimeError, match=rf"got {batch} rows of hidden states, but its model got 2"):
        edit.repeated(torch.zeros(2, 1, 1), batch)


# Over other processors


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_without_an_edit_bits_are_those_of_the_wrapped_processor(unet, concepts_of, make):
    unet.set_attn_processor(make())
    plain = predict(unet)
    source = Source(edit_of(concepts_of("my-cat")))
    wrap_all(unet, source)
    found = predict(unet)
    assert not torch.allclose(found[1], plain[1], atol=1e-2)
    assert torch.equal(found[0], plain[0])  # the unconditional half, in the same batch
    source.edit = None
    assert torch.equal(predict(unet), plain)


def test_all_processors_agree(unet, concepts_of):
    source, found = Source(edit_of(concepts_of("my-cat", "my-dog"))), []
    for make in PROCESSORS.values():
        unet.set_attn_processor(make())
        wrap_all(unet, source)
        found.append(predict(unet))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0])
def test_an_image_prompt_works_beside_a_concept(unet, concepts_of, kind):
    """The image's own keys and values are not edited, the text's are, and masks of the image arrive."""
    name, layer = next(iter(cross_attention_layers(unet).items()))
    torch.manual_seed(0)
    image_processor = kind(layer.inner_dim, WIDTH, num_tokens=(4,), scale=[0.7]).requires_grad_(False)
    layer.set_processor(image_processor)
    hidden_states, image = torch.randn(2, 64, layer.query_dim), torch.randn(2, 1, 4, WIDTH)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1

    def run(scale=0.7, **arguments):
        image_processor.scale = [scale]
        return layer(hidden_states, encoder_hidden_states=(encodings(), [image]), **arguments)

    plain, masked, text, saved = run(), run(ip_adapter_masks=[mask]), run(0.0), layer.state_dict()
    source = Source()
    layer.set_processor(wrap(image_processor, (), name, source))
    assert isinstance(layer.processor, PerfusionAttnProcessor)
    assert layer.state_dict().keys() == saved.keys()
    assert torch.equal(run(), plain)
    source.edit = edit_of(concepts_of("my-cat"))
    assert torch.equal(run()[0], plain[0])
    assert torch.equal(run(ip_adapter_masks=[mask])[0], masked[0])
    edited_text = run(0.0)
    assert not torch.allclose(edited_text[1], text[1], atol=1e-3)
    torch.testing.assert_close(run() - edited_text, plain - text, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(ip_adapter_masks=[mask]) - edited_text, masked - text, atol=1e-5, rtol=1e-4)


def test_arguments_of_the_wrapped_processor_reach_it(unet, concepts_of):
    class Louder(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, loudness=1.0):
            return loudness * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    for layer in cross_attention_layers(unet).values():
        layer.set_processor(Louder())
    wrap_all(unet, Source(edit_of(concepts_of("my-cat"))))
    assert not torch.allclose(predict(unet), predict(unet, cross_attention_kwargs={"loudness": 3.0}), atol=1e-3)


def test_fused_projections_are_edited_as_two(unet, concepts_of):
    source, before = Source(edit_of(concepts_of("my-cat"))), dict(unet.attn_processors)
    wrap_all(unet, source)
    expected = predict(unet)
    unet.set_attn_processor(before)
    unet.fuse_qkv_projections()
    assert any(isinstance(processor, FusedAttnProcessor2_0) for processor in unet.attn_processors.values())
    plain = predict(unet)
    wrap_all(unet, source)
    torch.testing.assert_close(predict(unet), expected)
    assert torch.equal(predict(unet)[0], plain[0])
    source.edit = None
    assert torch.equal(predict(unet), plain)


def test_a_processor_that_does_not_call_a_projection_is_an_error(unet, concepts_of):
    class Half(Recorder):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            attn.to_v(encoder_hidden_states)
            return torch.zeros_like(hidden_states)

    for layer in cross_attention_layers(unet).values():
        layer.set_processor(Half())
    wrap_all(unet, Source(edit_of(concepts_of("my-cat"))))
    with pytest.raises(RuntimeError, match=r"Half on .* without calling to_k,"):
        predict(unet)


def test_a_processor_that_wraps_ours_and_is_wrapped_edits_once(unet, concepts_of):
    source = Source(edit_of(concepts_of("my-cat")))
    wrap_all(unet, source)
    once = predict(unet)
    wrap_all(unet, source)
    assert torch.equal(predict(unet), once)


# The processor alone


def rows_with(*concepts):
    """Hidden states of which each row holds every concept, and little else."""
    e = encodings() / 10
    for number, concept in enumerate(concepts):
        concept.target_input = concept.inverse_target_input = 10 * torch.eye(WIDTH)[number]  # easily told apart
        e[:, 2 + number] = concept.target_input
    return e


@NAMES
def test_the_content_gate_edits_rows_where_it_finds_the_concepts(unet, concepts_of, names):
    concepts, recorders = concepts_of(*names), record(unet)
    rows = rows_with(*concepts)
    unet.set_attn_processor(attn_processors(concepts, unet))
    predict(unet, rows)
    for name, layer in cross_attention_layers(unet).items():
        for number, e in enumerate(rows):
            w_k, w_v = layer.to_k.weight, layer.to_v.weight
            key = edited(e, w_k, concepts, [w_k @ concept.superclass_input for concept in concepts])
            value = edited(e, w_v, concepts, [concept.target_outputs[name] for concept in concepts])
            torch.testing.assert_close(recorders[name].key[number], key, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(recorders[name].value[number], value, atol=2e-5, rtol=1e-4)


@NAMES
def test_the_content_gate_leaves_rows_alone_in_which_nothing_is_like_a_concept(concepts_of, names):
    concepts = concepts_of(*names)
    e = rows_with(*concepts)
    e[1] *= 1e-3
    edit = ContentGate(concepts).edit_for(e, "layer")
    assert edit.gate[0].any(0).all() and not edit.gate[1].any()


@pytest.mark.parametrize(
    ("settings", "bias", "temperature"),
    [
        ({}, [0.4, 0.4], 0.3),
        ({"bias": 0.7}, [0.7, 0.7], 0.3),
        ({"bias": [0.7, 0.1], "temperature": 0.5}, [0.7, 0.1], 0.5),
    ],
)
def test_settings_of_the_content_gate(concepts_of, settings, bias, temperature):
    concepts = concepts_of("my-cat", "my-dog", bias=0.4, temperature=0.3)
    rows = rows_with(*concepts)
    edit = ContentGate(concepts, **settings).edit_for(rows, "layer")
    for n in range(2):
        expected = torch.sigmoid(torch.tensor((1 - bias[n]) / temperature))
        torch.testing.assert_close(edit.gate[:, 2 + n, n], expected.expand(2))


@pytest.mark.parametrize("name", ["bias", "temperature"])
def test_settings_are_one_for_all_concepts_or_one_each(unet, concepts_of, name):
    concepts = concepts_of("my-cat", "my-dog")
    with pytest.raises(ValueError, match=f"{name} has 3 numbers for 2 concepts"):
        attn_processors(concepts, unet, **{name: [0.1, 0.2, 0.3]})


def test_the_content_gate_is_computed_once_for_each_batch(concepts_of):
    (concept,) = concepts_of("my-cat")
    source, e = ContentGate([concept]), rows_with(concept)
    first = source.edit_for(e, "layer")
    assert source.edit_for(e, "layer") is first
    assert torch.equal(source.edit_for(e.mul_(2), "layer").coef, 2 * first.coef)
    assert torch.equal(source.edit_for(rows_with(concept), "layer").coef, first.coef)


def test_a_processor_that_has_edited_can_be_pickled(unet, concepts_of):
    unet.set_attn_processor(attn_processors(concepts_of("my-cat"), unet))
    e = encodings()
    expected = predict(unet, e)
    unet.set_attn_processor(pickle.loads(pickle.dumps(unet.attn_processors)))
    assert torch.equal(predict(unet, e), expected)


@NAMES
@pytest.mark.parametrize("bias", [None, 0.2])
def test_processors_alone_give_the_images_of_the_pipeline_where_every_row_holds_the_tokens(
    pipeline, generate, concepts_of, names, bias, monkeypatch
):
    monkeypatch.setattr("diffusers_perfusion.attention_processor.MIN_SIMILARITY", -torch.inf)  # concepts are random
    concepts = concepts_of(*names)
    prompts = [" on the beach ".join(f"<{name}>" for name in names), "a photo of " + " ".join(f"<{n}>" for n in names)]
    pipeline.load_perfusion(concepts)
    rows = 1.01 * pipeline.encode_prompt(prompts, "cpu", 1, False)[0]  # weighted, so that nothing fades
    arguments = {"prompt": None, "prompt_embeds": rows, "guidance_scale": 1.0}
    pipeline.set_perfusion(bias=bias)
    pipeline.mark_perfusion(rows)  # so that tokens are found, and not known
    expected = generate(prompts, **arguments)
    pipeline.unload_perfusion()
    plain = generate(prompts, **arguments)
    assert ((expected - plain).abs().amax((1, 2, 3)) > 1e-3).all()
    before = dict(pipeline.unet.attn_processors)
    pipeline.unet.set_attn_processor(attn_processors(concepts, pipeline.unet, bias))
    assert torch.equal(generate(prompts, **arguments), expected)
    pipeline.unet.set_attn_processor(before)
    assert torch.equal(generate(prompts, **arguments), plain)


def test_processors_of_other_layers_stay(unet, concepts_of):
    processors, before = attn_processors(concepts_of("my-cat"), unet), unet.attn_processors
    assert processors.keys() == before.keys()
    for name, processor in processors.items():
        assert isinstance(processor, PerfusionAttnProcessor) is ("attn2" in name)
        assert getattr(processor, "processor", processor) is before[name]


def test_one_layer_may_be_edited_alone(unet, concepts_of):
    (concept,) = concepts_of("my-cat")
    rows = rows_with(concept)
    name, layer = next(iter(cross_attention_layers(unet).items()))
    layer.set_processor(PerfusionAttnProcessor(concept, name, bias=0.2, temperature=0.5))
    assert isinstance(layer.processor.processor, AttnProcessor2_0)
    alone = predict(unet, rows)
    layer.set_processor(PerfusionAttnProcessor([concept], name, [0.2], [0.5], AttnProcessor2_0()))
    assert torch.equal(predict(unet, rows), alone)
    layer.set_processor(AttnProcessor2_0())
    assert not torch.allclose(predict(unet, rows), alone, atol=1e-3)


def test_a_layer_without_an_output_is_an_error(concepts_of):
    with pytest.raises(ValueError, match=r"'<my-cat>' has no output for the layer 'mid.attn2'; expected one of down"):
        PerfusionAttnProcessor(concepts_of("my-cat"), "mid.attn2")


def test_a_copy_of_an_edited_model_is_edited_too(unet, concepts_of):
    unet.set_attn_processor(attn_processors(concepts_of("my-cat"), unet))
    expected, copied = predict(unet), copy.deepcopy(unet)
    assert torch.equal(predict(copied), expected)
    for processor in copied.attn_processors.values():
        if isinstance(processor, PerfusionAttnProcessor):
            processor.edits.concepts = ()
    assert torch.equal(predict(unet), expected)


# Models that do not fit


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda o: o.pop(min(o)), r"1 missing \(down_blocks.0.*attn2\), 0 unknown"),
        (lambda o: o.update(other=torch.ones(3)), r"0 missing \(\), 1 unknown \(other\)"),
        (lambda o: o.update({min(o): torch.ones(48)}), "an output of 48 numbers for down_blocks.0.* has 16"),
    ],
    ids=["missing", "unknown", "size"],
)
def test_a_concept_with_other_layers_is_refused(unet, make_concept, change, match):
    concept = make_concept(base_model="some/other-model")
    layers = cross_attention_layers(unet)
    widths = {name: (layer.cross_attention_dim, layer.inner_kv_dim) for name, layer in layers.items()}
    check_concept_fits(concept, unet, widths)
    outputs = copy.copy(concept.target_outputs)
    change(outputs)
    concept.target_outputs = outputs
    with pytest.raises(ValueError, match=match) as caught:
        check_concept_fits(concept, unet, widths)
    assert "'<my-cat>'" in str(caught.value)
    assert "UNet2DConditionModel" in str(caught.value)
    assert "trained on some/other-model" in str(caught.value)
    with pytest.raises(ValueError, match=match):
        attn_processors([concept], unet)


@pytest.mark.parametrize("name", ["flux_pipeline", "z_image_pipeline"])
def test_a_model_without_cross_attention_is_refused(request, name):
    pipe = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=r"Transformer2DModel has no cross-attention .* load_perfusion"):
        random_concept(pipe).attn_processors(pipe.transformer)


def test_a_concept_of_another_width_is_refused(unet, xl_components, make_concept):
    with pytest.raises(
        ValueError, match=r"edits hidden states of width 32, but UNet2DConditionModel .* takes width 56"
    ):
        attn_processors([make_concept()], xl_components["unet"])
