from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import WIDTH, places_of
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from diffusers_perfusion.model_families import cross_attention_layers, family_of
from diffusers_perfusion.training import TrainingConfig, make_accelerator
from diffusers_perfusion.training.superclass import TEMPLATES, superclass_input
from diffusers_perfusion.training.trainer import CONCEPT_NAME, PerfusionTrainer
from diffusers_perfusion.training.training_data import TrainingData

TOKEN = "<my-cat>"


@pytest.fixture
def c_inv():
    e = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.linalg.inv(e.T @ e / len(e))


@pytest.fixture
def make_trainer(pipeline, training_settings, c_inv):
    """Make a trainer on the tiny pipeline, of which there can be one at a time."""

    def make(prompts=(None,) * 3, **settings):
        pipeline.unload_perfusion()
        for model in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            model.requires_grad_(False)
        generator = torch.Generator().manual_seed(9)
        latents = torch.randn(3, 4, 8, 8, generator=generator)
        masks = torch.rand(3, 1, 8, 8, generator=generator)
        config = TrainingConfig(**training_settings | settings)
        data = TrainingData(latents, masks, prompts)
        return PerfusionTrainer(pipeline, config, make_accelerator(config), data, c_inv)

    return make


def record_gradients(trainer):
    """A list that gets the gradients of each optimizer step, by parameter."""
    steps, step = [], trainer.optimizer.step

    def record():
        steps.append({name: parameter.grad.clone() for name, parameter in trainer.parameters.items()})
        step()

    trainer.optimizer.step = record
    return steps


def trained_tensors(trainer):
    """Copies of everything that is trained."""
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def assert_close(found, expected, rtol=1e-4, atol=1e-5):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_it_starts_at_the_superclass(make_trainer, pipeline, c_inv):
    i_super = superclass_input(family_of(pipeline), "teddy bear")
    embeddings = pipeline.text_encoder.get_input_embeddings().weight
    teddy, bear = pipeline.tokenizer("teddy bear", add_special_tokens=False).input_ids
    assert teddy != bear
    concept = make_trainer(superclass="teddy bear").concept
    assert torch.equal(concept.token_embeddings[0], embeddings[bear])
    assert torch.equal(concept.superclass_input, i_super)
    torch.testing.assert_close(concept.inverse_superclass_input, (c_inv @ i_super.double()).float())
    for name, layer in cross_attention_layers(pipeline.unet).items():
        torch.testing.assert_close(concept.target_outputs[name], layer.to_v(i_super))


@torch.no_grad()
def test_it_starts_at_an_embedding_of_textual_inversion(make_trainer, pipeline, c_inv, tmp_path):
    embedding = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    save_file({TOKEN: embedding}, tmp_path / "learned_embeds.safetensors")
    concept = make_trainer(initial_embedding=str(tmp_path / "learned_embeds.safetensors")).concept
    assert torch.equal(concept.token_embeddings[0], embedding)
    i_start = mean_hidden_state(pipeline, range(len(TEMPLATES)))
    assert torch.equal(concept.superclass_input, superclass_input(family_of(pipeline), concept.superclass))
    assert not torch.allclose(concept.superclass_input, i_start, atol=0.1)
    for name, layer in cross_attention_layers(pipeline.unet).items():
        torch.testing.assert_close(concept.target_outputs[name], layer.to_v(i_start))


def test_only_the_token_embedding_and_the_target_outputs_are_trained(make_trainer, pipeline):
    trainer = make_trainer()
    gradients = record_gradients(trainer)
    before = trained_tensors(trainer)
    trainer.step(0)
    layers = {f"target_outputs.{name}" for name in cross_attention_layers(pipeline.unet)}
    assert trainer.parameters.keys() == layers | {"token_embeddings.0"}
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.isfinite(gradient).all(), name
        assert not torch.equal(trainer.parameters[name], before[name])
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["token_embeddings.0", "target_outputs.down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
)
def test_gradients_are_those_of_the_loss(make_trainer, name):
    still = {"value_learning_rate": 0.0, "embedding_learning_rate": 0.0}
    trainer = make_trainer(**still)
    gradients = record_gradients(trainer)
    for _ in range(2):
        trainer.step(0)
    gradient = gradients[0][name]
    assert float((gradients[1][name] - gradient).norm() / gradient.norm()) < 0.1  # nothing is left of the first step

    def loss(move):
        trainer = make_trainer(**still)
        trainer.parameters[name].data += move * gradient / gradient.norm()
        return float(trainer.step(0))

    assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.03)


@torch.no_grad()
def mean_hidden_state(pipeline, prompts):
    """The mean hidden state at the placeholder token over prompts with templates by number."""
    prompts = [TEMPLATES[i].format(TOKEN) for i in prompts]
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    hidden_states = pipeline.text_encoder(ids).last_hidden_state
    places = [places_of(pipeline.tokenizer, prompt, TOKEN) for prompt in prompts]
    return torch.stack([row[place] for row, (place,) in zip(hidden_states, places, strict=True)]).mean(0)


def test_the_super_class_input_stays_where_it_is(make_trainer, c_inv):
    trainer = make_trainer()
    start = trainer.concept.superclass_input.clone()
    for index in range(2):
        trainer.step(index)
    assert torch.equal(trainer.concept.superclass_input, start)
    torch.testing.assert_close(trainer.concept.inverse_superclass_input, (c_inv @ start.double()).float())
    assert not trainer.concept.superclass_input.requires_grad


def test_an_image_is_trained_half_of_the_time_with_its_own_caption(make_trainer):
    prompts = ("a red <my-cat> on a street", None, "<my-cat> and a <my-cat>")
    trainer = make_trainer(prompts, train_batch_size=1000)
    images, chosen, timesteps, noise = trainer._sample(0)
    for image, own in ((0, len(TEMPLATES)), (1, None), (2, len(TEMPLATES) + 1)):
        of_image = chosen[images == image]
        captioned = of_image >= len(TEMPLATES)
        assert set(of_image[captioned].tolist()) == ({own} - {None})
        assert captioned.float().mean().item() == pytest.approx(0.5 if own else 0, abs=0.1)
    without = make_trainer(train_batch_size=1000)._sample(0)
    template = chosen < len(TEMPLATES)
    assert torch.equal(without[1][template], chosen[template])
    for found, expected in zip((images, timesteps, noise), (without[0], *without[2:]), strict=True):
        assert torch.equal(found, expected)


def test_a_step_with_captions_edits_where_their_tokens_are(make_trainer, pipeline):
    captions = "a red <my-cat> on a street", "<my-cat> and a <my-cat>"
    trainer = make_trainer((captions[0], None, captions[1]))
    seen, prepare = {}, trainer._registry.prepare

    def record(hidden_states, rows=None, pooled=None):
        prepare(hidden_states, rows, pooled)
        for row, gate in zip(rows or (), trainer._registry.edit.gate[..., 0], strict=rows is not None):
            seen[row[TOKEN]] = gate.isclose(gate.max()).nonzero()[:, 0].tolist()

    trainer._registry.prepare = record
    for index in range(8):
        trainer.step(index)
    for caption in captions:
        assert tuple(places_of(pipeline.tokenizer, caption, TOKEN)) in seen
    assert all(set(places) <= set(open_) for places, open_ in seen.items())


def test_timesteps_are_even(make_trainer):
    trainer = make_trainer(train_batch_size=4096)
    timesteps = trainer._sample(0)[2] / trainer.schedule.config.num_train_timesteps
    assert timesteps.histc(4, 0, 1) / 4096 == pytest.approx([1 / 4] * 4, abs=0.03)


def test_a_step_sees_what_its_seed_and_number_say(make_trainer):
    def losses(seed, indices):
        trainer = make_trainer(seed=seed, value_learning_rate=0.0, embedding_learning_rate=0.0, snr_gamma=5)
        return [float(trainer.step(index)) for index in indices]

    (first, second), again = losses(0, [0, 1]), losses(0, [1])
    assert second == pytest.approx(again[0], rel=1e-3)  # i* has moved a little
    assert abs(first - second) > 0.01
    assert abs(losses(1, [1])[0] - second) > 0.01


def test_accumulated_batches_are_one_batch(make_trainer):
    results = []
    for settings in (
        {"train_batch_size": 8},
        {"gradient_accumulation_steps": 2, "train_batch_size": 4},
        {"gradient_accumulation_steps": 2, "train_batch_size": 8},
    ):
        trainer = make_trainer(**settings)
        losses = [float(trainer.step(index)) for index in range(3)]
        results.append((losses, trained_tensors(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)
    assert results[2][0] != pytest.approx(results[0][0], rel=1e-3)


def test_gradient_checkpointing_changes_no_gradient(make_trainer, pipeline):
    gradients = []
    for on in (False, True):
        trainer = make_trainer()
        if on:
            pipeline.unet.enable_gradient_checkpointing()
        steps = record_gradients(trainer)
        trainer.step(0)
        trainer.step(1)
        gradients.append(steps)
    for plain, saving in zip(*gradients, strict=True):
        assert_close(saving, plain, atol=1e-7)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_falls(make_trainer, pipeline, kind):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    for layer in cross_attention_layers(pipeline.unet).values():
        layer.to_out[0].weight.data *= 10  # or the text hardly matters to a UNet with initial weights
    trainer = make_trainer(superclass="teddy bear", value_learning_rate=0.03, embedding_learning_rate=0.006)
    losses = [trainer.step(0) for _ in range(15)]  # the same images, noises and prompts each time
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]


def test_the_loss_is_weighted_by_noise_and_by_masks(make_trainer):
    still = {"value_learning_rate": 0.0, "embedding_learning_rate": 0.0}
    plain = float(make_trainer(**still, snr_gamma=0).step(0))
    assert float(make_trainer(**still, snr_gamma=5).step(0)) != pytest.approx(plain, rel=1e-2)
    assert float(make_trainer(**still, snr_gamma=1e9).step(0)) == pytest.approx(plain, rel=1e-5)
    trainer = make_trainer(**still, snr_gamma=0)
    trainer.data.masks[...] = 1
    assert float(trainer.step(0)) != pytest.approx(plain, rel=1e-3)


def test_the_gate_is_that_of_the_training_settings(make_trainer):
    def loss(**settings):
        trainer = make_trainer(value_learning_rate=0.0, embedding_learning_rate=0.0, **settings)
        with torch.no_grad():
            for output in trainer.concept.target_outputs.values():
                output += 1  # where they start, at the super-class's, a closed gate lets the same through
        return float(trainer.step(0))

    plain = loss()
    assert loss(train_bias=1.2) != pytest.approx(plain, rel=1e-4)
    assert loss(train_temperature=0.5) != pytest.approx(plain, rel=1e-4)


def test_gradients_of_nothing_but_zeros_are_an_error(make_trainer, pipeline):
    for layer in cross_attention_layers(pipeline.unet).values():
        layer.to_out[0].weight.data.zero_()
    with pytest.raises(RuntimeError, match="gradients of the first step are all zero"):
        make_trainer().step(0)


def test_gradients_that_are_not_finite_are_an_error(make_trainer, pipeline):
    pipeline.unet.conv_out.weight.data[0, 0] = torch.inf
    with pytest.raises(RuntimeError, match="gradients of the first step are not finite"):
        make_trainer().step(0)


def test_threads_do_not_change_a_bit(make_trainer):
    """Sums in the order in which threads come would make every training another one."""
    trainer = make_trainer(train_batch_size=256)
    batch = trainer._sample(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = [
            torch.autograd.grad(trainer._forward(trainer.model, *batch), trainer.concept.token_embeddings[0])[0]
            for _ in range(6)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def rates(trainer, steps):
    """Learning rates of the target outputs and of the token embedding in each step."""
    found = []
    for index in range(steps):
        trainer.step(index)
        found.append([group["lr"] for group in trainer.optimizer.param_groups])
    return torch.tensor(found)


def test_learning_rates_rise_and_stay(make_trainer):
    found = rates(make_trainer(lr_scheduler="constant_with_warmup", lr_warmup_steps=4), 6)
    expected = torch.tensor([0.25, 0.5, 0.75, 1, 1, 1])
    torch.testing.assert_close(found[:, 0], 0.03 * expected)
    torch.testing.assert_close(found[:, 1], 0.006 * expected)


def test_learning_rates_follow_the_schedule(make_trainer):
    linear = rates(make_trainer(lr_scheduler="linear", max_train_steps=4, lr_warmup_steps=0), 4)
    torch.testing.assert_close(linear[:, 0], 0.03 * torch.tensor([4, 3, 2, 1]) / 5)
    cosine = rates(make_trainer(lr_scheduler="cosine", max_train_steps=7), 4)
    torch.testing.assert_close(cosine[3], torch.tensor([0.015, 0.003]))


def test_each_parameter_has_the_learning_rate_of_its_kind(make_trainer):
    trainer = make_trainer(value_learning_rate=0.01, embedding_learning_rate=0.002, lr_scheduler="constant")
    before = trained_tensors(trainer)
    trainer.step(0)
    for name, parameter in trainer.parameters.items():
        moved = (parameter.detach() - before[name]).abs().max()  # Adam's first step is the learning rate itself
        assert float(moved) == pytest.approx(0.002 if name == "token_embeddings.0" else 0.01, rel=0.01)


def test_scaled_learning_rates(make_trainer):
    settings = {"lr_scheduler": "constant", "train_batch_size": 2, "gradient_accumulation_steps": 3}
    found = rates(make_trainer(scale_lr=True, **settings), 1)
    torch.testing.assert_close(found[0], 6 * torch.tensor([0.03, 0.006]))


def test_half_precision_is_near_full_precision(make_trainer, pipeline, fresh_accelerate):
    trainer = make_trainer(mixed_precision="no")
    steps = [record_gradients(trainer)]
    losses = [[float(trainer.step(0))]]
    type(trainer.accelerator.state)._reset_state(reset_partial_state=True)
    trainer = make_trainer(mixed_precision="bf16")
    pipeline.unet.to(torch.bfloat16)
    steps.append(record_gradients(trainer))
    losses.append([float(trainer.step(0))])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    full, half = (torch.cat(list(step[0].values())) for step in steps)
    assert torch.cosine_similarity(full, half, dim=0) > 0.98
    assert half.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())


def test_the_trained_concept_is_a_copy(make_trainer):
    trainer = make_trainer(pretrained_model_name_or_path="someone/model")
    trainer.step(0)
    concept = trainer.trained_concept(1, images=5)
    before = trained_tensors(trainer)
    assert torch.equal(concept.token_embeddings[0], before["token_embeddings.0"])
    assert not concept.token_embeddings[0].requires_grad
    assert concept.base_model == "someone/model"
    assert {"steps": 1, "images": 5, "seed": 0, "train_bias": 0.75}.items() <= concept.training.items()
    kept = concept.token_embeddings[0].clone()
    trainer.step(1)
    assert torch.equal(concept.token_embeddings[0], kept)
    assert trainer.pipeline.get_active_perfusion() == [CONCEPT_NAME]


def test_a_trainer_resumes_where_another_stopped(make_trainer):
    trainer = make_trainer()
    for index in range(2):
        trainer.step(index)
    state = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    for index in range(2, 4):
        trainer.step(index)
    unbroken = trained_tensors(trainer)

    trainer = make_trainer()
    trainer.load_state_dict(state)
    for index in range(2, 4):
        trainer.step(index)
    assert_close(trained_tensors(trainer), unbroken, rtol=0, atol=0)


def test_the_state_of_another_model_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.step(0)
    state = trainer.state_dict()
    for wrong in (
        {name: tensor for name, tensor in state.items() if name != "token_embeddings.0"},
        {name: tensor for name, tensor in state.items() if not name.startswith("adam.exp_avg.")},
        state | {"token_embeddings.0": torch.zeros(7)},
        state | {"target_input": torch.zeros(7)},
    ):
        with pytest.raises(ValueError, match=r"of another (concept or model|release: it also holds target_input)"):
            make_trainer().load_state_dict(wrong)


class Scaled(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, values, scale):
        ctx.scale = scale
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.scale * gradient, None


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_compiled_model_that_has_other_gradients_is_refused(make_trainer, monkeypatch, scale):
    """As torch 2.13 on a CPU, where all are zero in bfloat16."""

    def compile(model):
        def run(*args, **kwargs):
            output = model(*args, **kwargs)
            return replace(output, sample=Scaled.apply(output.sample, scale))

        return run

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(RuntimeError, match=r"torch.compile gives other gradients .* in torch.float32; train"):
        make_trainer(torch_compile=True).step(0)


def test_a_compiled_model_trains_the_same_and_is_compiled_once(make_trainer, monkeypatch):
    trainer = make_trainer()
    expected = [float(trainer.step(index)) for index in range(3)]
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    trainer = make_trainer(torch_compile=True)
    losses, counts = zip(*((float(trainer.step(index)), counter.frame_count) for index in range(3)), strict=True)
    assert losses == pytest.approx(expected)
    assert counts[0] > 0 and len(set(counts)) == 1
