"""The edit inside a UNet: the right keys and values, over any processor and projection, and off without a trace."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from peft import LoraConfig

from diffusers_perfusion.attention import (
    PerfusionAttnProcessor,
    attach,
    check_concept_fits,
    cross_attention_layers,
    detach,
    get_state,
    replaced_layers,
)
from diffusers_perfusion.state import LoadedConcept, PerfusionState
from diffusers_perfusion.text import TextEncoders
from diffusers_perfusion.vocabulary import Vocabulary

LENGTH, WIDTH = 24, 32
PROCESSORS = {
    "AttnProcessor": AttnProcessor,
    "AttnProcessor2_0": AttnProcessor2_0,
    "SlicedAttnProcessor": lambda: SlicedAttnProcessor(1),
}


@pytest.fixture
def unet(components):
    return components["unet"].requires_grad_(False)


@pytest.fixture
def state(components):
    return PerfusionState(Vocabulary(TextEncoders([components["tokenizer"]], [components["text_encoder"]])))


@pytest.fixture
def load(state, make_concept):
    """Load random concepts into `state` and mark the second row of `encodings()` as holding their words."""

    def run(*names, **fields):
        for seed, name in enumerate(names):
            concept = make_concept(f"<{name}>", seed=seed, **fields)
            state.loaded[name] = LoadedConcept(concept, torch.tensor(concept.bias), torch.tensor(concept.temperature))
            state.active.append(name)
        state.mark(encodings()[1], tuple(f"<{name}>" for name in names), encodings(5)[1])
        return [state.loaded[name].concept for name in names]

    return run


def encodings(seed=0):
    """Of a prompt without and a prompt with words, as guidance has them in one batch."""
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


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
    """`W e_⊥J + Σ_j gate_j o_j + rest_j W s_j` with dense matrices in float64, for encodings `(length, d)`."""
    i = torch.stack([concept.target_input for concept in concepts]).double()
    c_inv_i = torch.stack([concept.inverse_target_input for concept in concepts]).double()
    e, weight, outputs = e.double(), weight.double(), torch.stack(list(outputs)).double()
    coordinates = torch.linalg.inv(c_inv_i @ i.T) @ c_inv_i
    onto = i.T @ coordinates
    h = e @ (torch.eye(WIDTH).double() - onto).T @ weight.T
    for concept, o, coef in zip(concepts, outputs, coordinates @ e.T, strict=True):
        inverse = concept.inverse_target_input.double()
        sim = e @ inverse / (concept.target_input.double() @ inverse)
        gate = torch.sigmoid((sim - concept.bias) / concept.temperature)
        h = h + gate[:, None] * o + torch.relu(coef - gate)[:, None] * (weight @ concept.superclass_input.double())
    return h.float()


def check_keys_and_values(recorders, concepts, key_weights, value_weights, key_bias=0.0, value_bias=0.0):
    """Compare what the recorders hold of `encodings()` with equation 4 under local locking."""
    for name, recorder in recorders.items():
        w_k, w_v = key_weights[name], value_weights[name]
        key = edited(encodings()[1], w_k, concepts, [w_k @ concept.superclass_input for concept in concepts])
        value = edited(encodings()[1], w_v, concepts, [concept.target_outputs[name] for concept in concepts])
        for got, wanted, weight, bias in (
            (recorder.key, key, w_k, key_bias),
            (recorder.value, value, w_v, value_bias),
        ):
            torch.testing.assert_close(got[1], wanted + bias, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(got[0], encodings()[0] @ weight.T + bias, atol=2e-5, rtol=1e-4)
            # The test would see it if nothing were edited.
            assert not torch.allclose(got[1], encodings()[1] @ weight.T + bias, atol=1e-2)


def weights(unet, projection):
    return {name: getattr(layer, projection).weight for name, layer in cross_attention_layers(unet).items()}


# The right keys and values


@pytest.mark.parametrize("names", [["my-cat"], ["my-cat", "my-dog"]])
def test_keys_and_values_are_those_of_equation_4_with_locked_keys(unet, state, load, names):
    concepts = load(*names)
    recorders = record(unet)
    attach(unet, state)
    predict(unet)
    check_keys_and_values(recorders, concepts, weights(unet, "to_k"), weights(unet, "to_v"))


@pytest.mark.parametrize("names", [["my-cat"], ["my-cat", "my-dog"]])
def test_global_locking_takes_all_keys_from_the_twin(unet, state, load, names):
    concepts = load(*names)
    recorders = record(unet)
    attach(unet, state)
    state.locking = "global"
    predict(unet)
    for name, layer in cross_attention_layers(unet).items():
        assert torch.equal(recorders[name].key[1], layer.to_k(torch.stack([encodings()[0], encodings(5)[1]]))[1])
        assert torch.equal(recorders[name].key[0], layer.to_k(encodings())[0])
        outputs = [concept.target_outputs[name] for concept in concepts]
        value = edited(encodings()[1], layer.to_v.weight, concepts, outputs)
        torch.testing.assert_close(recorders[name].value[1], value, atol=2e-5, rtol=1e-4)


def test_projections_with_a_bias_keep_it_once(unet, state, load):
    concepts = load("my-cat", "my-dog")
    recorders = record(unet)
    for layer in cross_attention_layers(unet).values():
        for name in ("to_k", "to_v"):
            weight = getattr(layer, name).weight
            projection = torch.nn.Linear(*reversed(weight.shape))
            projection.weight.data, projection.bias.data = weight, torch.full((len(weight),), 3.0)
            setattr(layer, name, projection.requires_grad_(False))
    attach(unet, state)
    predict(unet)
    check_keys_and_values(recorders, concepts, weights(unet, "to_k"), weights(unet, "to_v"), 3.0, 3.0)


@pytest.mark.parametrize("before", [True, False])
def test_a_lora_is_part_of_the_edited_projections(unet, state, load, before):
    concepts = load("my-cat", "my-dog")
    recorders = record(unet)
    if not before:
        attach(unet, state)
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "to_v"], init_lora_weights=False))
    if before:
        attach(unet, state)
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


def test_projections_are_called_and_not_read(unet, state, load):
    """An offloaded or quantised layer has no weight to read; its module is called."""

    class Hidden(torch.nn.Module):
        def __init__(self, projection):
            super().__init__()
            self.run = [projection]  # out of sight

        def forward(self, inputs):
            return self.run[0](inputs)

    load("my-cat")
    attach(unet, state)
    edited = predict(unet)
    for layer in cross_attention_layers(unet).values():
        layer.to_k, layer.to_v = Hidden(layer.to_k), Hidden(layer.to_v)
    assert torch.equal(predict(unet), edited)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_edited(unet, state, load, dtype):
    load("my-cat", "my-dog")
    recorders = record(unet)
    attach(unet, state)
    predict(unet)
    exact = {name: (recorder.key, recorder.value) for name, recorder in recorders.items()}
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert unet.to(dtype)(sample.to(dtype), 500, encodings().to(dtype)).sample.dtype == dtype
    for name, recorder in recorders.items():
        for got, wanted in zip((recorder.key, recorder.value), exact[name], strict=True):
            assert got.dtype == dtype
            assert (got.float() - wanted).norm() < 0.02 * wanted.norm()


def test_a_concept_as_it_is_stored_is_edited_under_autocast(unet, state, load):
    load("my-cat", bias=0.1)
    attach(unet, state)
    with torch.autocast("cpu", torch.bfloat16):
        edited = predict(unet)
        state.loaded["my-cat"].concept = state.loaded["my-cat"].concept.to(torch.float16)
        state.refresh()
        stored = predict(unet)
        state.active.clear()
        state.refresh()
        plain = predict(unet)
    assert (stored - edited).norm() < 0.2 * (edited - plain).norm()


# Over other processors


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_without_an_active_concept_bits_are_those_of_the_processor_below(unet, state, load, make):
    unet.set_attn_processor(make())
    bare, other = predict(unet), predict(unet, encodings(3))
    load("my-cat")
    attach(unet, state)
    edited = predict(unet)
    assert not torch.allclose(edited[1], bare[1], atol=1e-2)
    assert torch.equal(edited[0], bare[0])  # the half without guidance, in the same batch
    assert torch.equal(predict(unet, encodings(3)), other)  # no word in the prompt
    state.enabled = False
    state.refresh()
    assert torch.equal(predict(unet), bare)
    state.enabled, state.active = True, []
    state.refresh()
    assert torch.equal(predict(unet), bare)


def test_all_processors_agree(unet, state, load):
    load("my-cat", "my-dog")
    edited = []
    for make in PROCESSORS.values():
        unet.set_attn_processor(make())
        attach(unet, state)
        edited.append(predict(unet))
    for other in edited[1:]:
        torch.testing.assert_close(other, edited[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0])
def test_an_image_prompt_works_beside_a_concept(unet, state, load, kind):
    """The picture's own keys and values are not edited, the text's are, and masks of the picture arrive."""
    layer = next(iter(cross_attention_layers(unet).values()))
    torch.manual_seed(0)
    layer.set_processor(kind(layer.inner_dim, WIDTH, num_tokens=(4,), scale=[0.7]).requires_grad_(False))
    hidden_states, image = torch.randn(2, 64, layer.query_dim), torch.randn(2, 1, 4, WIDTH)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1

    def run(scale=0.7, **arguments):
        processor = getattr(layer.processor, "processor", layer.processor)
        processor.scale = [scale]
        return layer(hidden_states, encoder_hidden_states=(encodings(), [image]), **arguments)

    bare, masked, text = run(), run(ip_adapter_masks=[mask]), run(0.0)
    load("my-cat")
    attach(unet, state)
    assert isinstance(layer.processor, PerfusionAttnProcessor)
    assert torch.equal(run(), bare)
    state.prepare(encodings())
    assert torch.equal(run()[0], bare[0])
    assert torch.equal(run(ip_adapter_masks=[mask])[0], masked[0])
    edited_text = run(0.0)
    assert not torch.allclose(edited_text[1], text[1], atol=1e-3)
    torch.testing.assert_close(run() - edited_text, bare - text, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(ip_adapter_masks=[mask]) - edited_text, masked - text, atol=1e-5, rtol=1e-4)


def test_arguments_of_a_processor_of_one_s_own_reach_it(unet, state, load):
    class Louder(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, loudness=1.0):
            return loudness * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    for layer in cross_attention_layers(unet).values():
        layer.set_processor(Louder())
    load("my-cat")
    attach(unet, state)
    assert not torch.allclose(predict(unet), predict(unet, cross_attention_kwargs={"loudness": 3.0}), atol=1e-3)


def test_fused_projections_are_edited_as_two(unet, state, load):
    load("my-cat")
    attach(unet, state)
    expected = predict(unet)
    detach(unet)
    unet.fuse_qkv_projections()
    assert any(isinstance(processor, FusedAttnProcessor2_0) for processor in unet.attn_processors.values())
    bare, plain = predict(unet), predict(unet, encodings(3))
    attach(unet, state)
    torch.testing.assert_close(predict(unet), expected)
    assert torch.equal(predict(unet)[0], bare[0]) and not torch.allclose(predict(unet)[1], bare[1], atol=1e-3)
    assert torch.equal(predict(unet, encodings(3)), plain)


def test_a_processor_that_uses_one_of_the_projections_is_an_error(unet, state, load):
    class Half(Recorder):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            attn.to_v(encoder_hidden_states)
            return torch.zeros_like(hidden_states)

    load("my-cat")
    for layer in cross_attention_layers(unet).values():
        layer.set_processor(Half())
    attach(unet, state)
    with pytest.raises(RuntimeError, match=r"Half on .* without calling to_k,"):
        predict(unet)


@pytest.mark.parametrize("part", [False, True])
def test_replaced_processors_are_an_error_and_repaired_by_attach(unet, state, load, part):
    load("my-cat")
    attach(unet, state)
    edited = predict(unet)
    assert replaced_layers(state) == {}
    if part:
        next(iter(cross_attention_layers(unet).values())).set_processor(AttnProcessor())
    else:
        unet.set_attn_processor(AttnProcessor())
    assert set(replaced_layers(state).values()) == {"AttnProcessor"}
    with pytest.raises(RuntimeError, match=rf"{len(replaced_layers(state))} layers were replaced .*enable_perfusion"):
        predict(unet)
    predict(unet, encodings(3))  # a prompt without a word works on
    attach(unet, state)
    torch.testing.assert_close(predict(unet), edited, atol=1e-5, rtol=1e-4)


# On and off


def test_detach_gives_back_the_very_processors(unet, state, load):
    before = dict(unet.attn_processors)
    bare, hooks = predict(unet), dict(unet._forward_pre_hooks)
    load("my-cat")
    for _ in range(2):
        attach(unet, state)
        assert get_state(unet) is state
        assert not torch.equal(predict(unet), bare)
        detach(unet)
        detach(unet)
        assert get_state(unet) is None
        assert unet.attn_processors.keys() == before.keys()
        assert all(unet.attn_processors[name] is processor for name, processor in before.items())
        assert dict(unet._forward_pre_hooks) == hooks
        assert torch.equal(predict(unet), bare)


def test_attach_twice_is_once(unet, state, load):
    load("my-cat")
    attach(unet, state)
    processors, hooks, edited = dict(unet.attn_processors), dict(unet._forward_pre_hooks), predict(unet)
    attach(unet, state)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert dict(unet._forward_pre_hooks) == hooks
    assert torch.equal(predict(unet), edited)


def test_only_cross_attention_is_touched(unet, state):
    before = dict(unet.attn_processors)
    attach(unet, state)
    touched = {name for name, processor in unet.attn_processors.items() if processor is not before[name]}
    assert touched == {name for name in before if "attn2" in name}
    assert {name.removesuffix(".processor") for name in touched} == set(cross_attention_layers(unet))


def test_saved_weights_of_the_unet_know_nothing_of_it(unet, state, load, tmp_path):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    load("my-cat")
    attach(unet, state)
    predict(unet)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    for state_dict in (unet.state_dict(), loaded.state_dict()):
        assert state_dict.keys() == before.keys()
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in before.items())
    assert get_state(loaded) is None


def test_arguments_by_name_and_by_place_are_both_seen(unet, state, load):
    load("my-cat")
    attach(unet, state)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    by_name = unet(sample=sample, timestep=500, encoder_hidden_states=encodings()).sample
    assert torch.equal(by_name, predict(unet))
    forward = unet.forward
    unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as tools that cache blocks do
    assert torch.equal(by_name, predict(unet))


# Fitting


def parameters_of(concept):
    concept.target_outputs = {name: torch.nn.Parameter(tensor) for name, tensor in concept.target_outputs.items()}
    return list(concept.target_outputs.values())


def gradients(unet, state, parameters, e):
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    state.prepare(e, words=[(), ("<my-cat>",)])
    unet(sample, 500, e).sample.square().mean().backward()
    got = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return got


def test_gradients_reach_the_concept_and_the_encoding_alone(unet, state, load):
    (concept,) = load("my-cat")
    parameters = parameters_of(concept)
    e = encodings().requires_grad_()
    attach(unet, state)
    assert all(gradient.abs().max() > 0 for gradient in gradients(unet, state, parameters, e))
    assert e.grad[1].abs().max() > 0
    assert all(parameter.grad is None for parameter in unet.parameters())
    others = (concept.target_input, concept.inverse_target_input, concept.superclass_input)
    assert not any(tensor.requires_grad for tensor in others)


def test_gradient_of_a_target_output_is_its_gate(unet, state, load):
    concepts = load("my-cat", "my-dog")
    recorders = record(unet)
    parameters = {concept.placeholder_token: parameters_of(concept) for concept in concepts}
    attach(unet, state)
    state.prepare(e := encodings())
    unet(torch.randn(2, 4, 8, 8), 500, e)
    sum(recorder.value.sum() for recorder in recorders.values()).backward()
    for gates, concept in zip(state.edit.gate.sum((0, 1)), concepts, strict=True):
        for parameter in parameters[concept.placeholder_token]:
            torch.testing.assert_close(parameter.grad, gates.expand_as(parameter))


def test_gradient_checkpointing_gives_the_same_gradients(unet, state, load):
    """The processor runs again in the backward pass."""
    (concept,) = load("my-cat")
    parameters = parameters_of(concept)
    attach(unet.train(), state)
    plain_encodings, encodings_again = encodings().requires_grad_(), encodings().requires_grad_()
    plain = gradients(unet, state, parameters, plain_encodings)
    unet.enable_gradient_checkpointing()
    again = gradients(unet, state, parameters, encodings_again)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(plain_encodings.grad, encodings_again.grad)


# Models that do not fit


def test_joint_attention_models_are_refused(state):
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel has no cross-attention .*joint attention"):
        attach(model, state)
    assert get_state(model) is None


def test_models_without_text_are_refused(state):
    model = UNet2DModel(
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="UNet2DModel has no cross-attention layer from text"):
        attach(model, state)


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
    check_concept_fits(concept, unet)
    outputs = copy.copy(concept.target_outputs)
    change(outputs)
    concept.target_outputs = outputs
    with pytest.raises(ValueError, match=match) as caught:
        check_concept_fits(concept, unet)
    assert "'<my-cat>'" in str(caught.value)
    assert "UNet2DConditionModel" in str(caught.value)
    assert "made for some/other-model" in str(caught.value)


# Text does not change between steps


@pytest.fixture
def calls(monkeypatch):
    """A list of the linear layers that are called."""
    called, forward = [], torch.nn.Linear.forward

    def recording(self, x):
        called.append(self)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", recording)
    return called


def projections(unet):
    return [p for layer in cross_attention_layers(unet).values() for p in (layer.to_k, layer.to_v)]


def test_keys_and_values_are_made_once(unet, state, load, calls):
    """One call for the encodings and one for the inputs of concepts, however many steps there are."""
    load("my-cat", "my-dog")
    attach(unet, state)
    e = encodings()
    for _ in range(3):
        predict(unet, e)
    assert [sum(one is p for one in calls) for p in projections(unet)] == [2] * len(projections(unet))
    predict(unet, e.clone())
    assert [sum(one is p for one in calls) for p in projections(unet)] == [4] * len(projections(unet))


def test_made_again_or_not_the_bits_are_the_same(unet, state, load, monkeypatch):
    load("my-cat", "my-dog")
    attach(unet, state)
    e = encodings()
    again = [predict(unet, e) for _ in range(3)]
    monkeypatch.setattr("diffusers_perfusion.attention._is_repeatable", lambda projection: False)
    assert all(torch.equal(one, predict(unet, e)) for one in again)


@torch.no_grad()
def in_place(tensor):
    tensor.add_(0.5)


CHANGES_BETWEEN_STEPS = {
    # Of the row without words: of the other they would be a prompt's that nobody has encoded.
    "encodings": lambda unet, state, e: in_place(e[0]),
    "weights": lambda unet, state, e: in_place(projections(unet)[0].weight),
    "new weights": lambda unet, state, e: setattr(
        projections(unet)[1], "weight", torch.nn.Parameter(projections(unet)[1].weight + 0.5)
    ),
    "outputs": lambda unet, state, e: [
        in_place(output) for output in state.loaded["my-cat"].concept.target_outputs.values()
    ],
    "LoRA": lambda unet, state, e: unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "one"
    ),
}


def check_made_again(unet, state, change):
    e = encodings()
    before = predict(unet, e)
    change(unet, state, e)
    after = predict(unet, e)
    assert not torch.equal(after, before)
    state.refresh()
    assert torch.equal(predict(unet, e), after)


@pytest.mark.parametrize("change", CHANGES_BETWEEN_STEPS)
def test_what_changes_between_steps_is_made_again(unet, state, load, change):
    load("my-cat")
    attach(unet, state)
    check_made_again(unet, state, CHANGES_BETWEEN_STEPS[change])


def test_a_lora_that_changes_between_steps(unet, state, load):
    load("my-cat")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "one")
    attach(unet, state)
    check_made_again(unet, state, lambda unet, state, e: unet.set_adapters("one", 0.3))


def test_autocast_between_steps(unet, state, load):
    load("my-cat")
    attach(unet, state)
    e = encodings()
    before = predict(unet, e)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict(unet, e)
        state.refresh()
        assert torch.equal(predict(unet, e), rounded)
    assert torch.equal(predict(unet, e), before)


def test_keys_that_somebody_changes_in_place_are_made_again(unet, state, load):
    class Scaling(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            attn.to_k(encoder_hidden_states).mul_(2)
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    load("my-cat")
    attach(unet, state)
    e = encodings()
    expected = predict(unet, e)
    detach(unet)
    for layer in cross_attention_layers(unet).values():
        layer.set_processor(Scaling())
    attach(unet, state)
    for _ in range(2):
        torch.testing.assert_close(predict(unet, e), expected)


def test_gradients_flow_at_every_step(unet, state, load):
    (concept,) = load("my-cat")
    attach(unet, state)
    e = encodings()
    predict(unet, e)
    for output in concept.target_outputs.values():
        output.requires_grad_()
    latents = torch.randn(2, 4, 8, 8)
    for _ in range(2):
        unet(latents, 500, e).sample.sum().backward()
    assert all(output.grad.any() for output in concept.target_outputs.values())
