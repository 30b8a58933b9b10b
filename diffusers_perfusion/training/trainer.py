"""`PerfusionTrainer`: a concept in training, and one training step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..concept import PerfusionConcept
from ..model_families import PromptEncoding, family_of
from ..placeholder_tokens import PlaceholderTokens
from ..registry import registry_of, upload
from .config import TrainingConfig
from .initial_embedding import initial_embeddings, token_input, token_positions
from .loss import masked_loss, prediction_target, snr_weights
from .noise_schedule import noise_schedule
from .superclass import TEMPLATES, superclass_input
from .training_data import TrainingData

CONCEPT_NAME = "concept"

# How often an image that has a caption is trained with it, and not with a template.
CAPTION_SHARE = 0.5

# Between gradients with torch.compile and without: in bfloat16 both are rounded, and differently.
MIN_COSINE = 0.9

# Settings that are written into the concept file.
_RECORDED = (
    "seed",
    "train_batch_size",
    "gradient_accumulation_steps",
    "value_learning_rate",
    "embedding_learning_rate",
    "lr_scheduler",
    "train_bias",
    "train_temperature",
    "snr_gamma",
    "random_flip",
)


class PerfusionTrainer:
    """A concept on a pipeline, of which only `v*` and the `o*_V` have gradients (paper Section 4).

    In joint attention `i*` is trained instead of `v*`, unless its learning rate is 0: the model gets the super-class
    prompts, which are encoded once, and the text encoders leave the device.

    Everything random in a step follows from the seed and the number of the step, for the batch of all processes at
    once. So a training can be resumed at any step, and two processes train as one with twice the batch size.

    Args:
        pipeline: of the base model, frozen and on the accelerator's device, but for the model itself if it has joint
            attention; the concept is loaded into it.
        config: settings.
        accelerator: an `Accelerator`, or a `SingleProcess` for a training that other processes do not take part in.
        data: latents and masks to train on.
        c_inv: `C⁻¹`, `(d, d)` in float64; None for the identity.

    Attributes:
        concept: the concept; its tensors are the parameters.
        parameters: the trained tensors by name.
    """

    def __init__(
        self, pipeline: Any, config: TrainingConfig, accelerator: Any, data: TrainingData, c_inv: Tensor | None
    ):
        self.pipeline, self.config, self.accelerator = pipeline, config, accelerator
        self.data = data
        # Apple's accelerator has no float64.
        cpu = accelerator.device.type == "mps"
        self.c_inv = None if c_inv is None else c_inv.to("cpu" if cpu else accelerator.device)
        self.family = family_of(pipeline)
        self.schedule = noise_schedule(self.family, pipeline.scheduler)
        self.model = self.family.model
        self.concept = self._load_initial_concept()
        templates = [template.format(config.placeholder_token) for template in TEMPLATES]
        # Of each image: the number of its own prompt, or -1.
        captions = list(dict.fromkeys(prompt for prompt in data.prompts if prompt is not None))
        own = [-1 if prompt is None else len(templates) + captions.index(prompt) for prompt in data.prompts]
        self._own_prompt = torch.tensor(own)
        prompt_ids = self.family.tokenize([*templates, *captions])
        positions = token_positions(self.family, config.placeholder_token, prompt_ids)
        self._tokens_of_prompt = [{config.placeholder_token: places} for places in positions]
        self.prompt_ids = [ids.to(accelerator.device) for ids in prompt_ids]
        self._encoding: PromptEncoding | None = None
        self._learning_rates = [config.value_learning_rate, config.embedding_learning_rate]
        inputs = {f"token_embeddings.{number}": vector for number, vector in enumerate(self.concept.token_embeddings)}
        if self.family.joint:
            self._encoding = self._encode_superclass_prompts(prompt_ids)
            inputs = {"target_input": self.concept.target_input} if config.embedding_learning_rate else {}
            # Text encoders differ in the size of their hidden states. Some have few numbers that are far larger, and
            # zeros fill up a row to the width of another text encoder.
            sizes = self.concept.superclass_input.abs()
            self._learning_rates[1] *= float(sizes[sizes > 0].median())
        outputs = {f"target_outputs.{layer}": output for layer, output in self.concept.target_outputs.items()}
        self.parameters = inputs | outputs
        if config.scale_lr:
            self._learning_rates = [rate * self._total_batch_size for rate in self._learning_rates]
        adam = torch.optim.Adam([{"params": list(outputs.values())}, {"params": list(inputs.values())}])
        # Only its function of the step is used, so it has no state to resume.
        self._lr_factor = get_scheduler(
            config.lr_scheduler,
            torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps + 1,  # or the learning rate of the last step may be zero
        ).lr_lambdas[0]
        self.optimizer = accelerator.prepare(adam)
        self._compiled_model = self.model
        if config.torch_compile:
            torch.compiler.reset()  # earlier trainings in this process count towards torch's limit of recompilations
            self._compiled_model = torch.compile(self.model)
        self._checked = False
        if self.family.joint:
            self._move_text_encoders("cpu")
        self.model.to(accelerator.device)  # now, or the two might not fit there together

    @property
    def _registry(self) -> Any:
        return registry_of(self.model)

    @property
    def _total_batch_size(self) -> int:
        """Images in one optimizer step of all processes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _load_initial_concept(self) -> PerfusionConcept:
        """Load a concept with `v*` at its initial embeddings, and `o*_V` at the values of their hidden state."""
        pipeline, config = self.pipeline, self.config
        i_start = i_super = superclass_input(self.family, config.superclass)
        embeddings: list[Tensor] = [
            nn.Parameter(vector.to(i_super)) for vector in initial_embeddings(self.family, config)
        ]
        if config.initial_embedding is not None:
            i_start = token_input(self.family, config.placeholder_token, embeddings, config.superclass)
        if self.family.joint:
            i_start = nn.Parameter(i_start.clone())
        with torch.no_grad():
            outputs = self.family.initial_outputs(i_start.to(self.model.dtype))
        pipeline.load_perfusion(
            PerfusionConcept(
                placeholder_token=config.placeholder_token,
                superclass=config.superclass,
                token_embeddings=embeddings,
                target_input=i_start,
                inverse_target_input=self._inverse(i_start),
                superclass_input=i_super,
                inverse_superclass_input=self._inverse(i_super),
                target_outputs={layer: nn.Parameter(output) for layer, output in outputs.items()},
            ),
            concept_name=CONCEPT_NAME,
        )
        pipeline.set_perfusion(CONCEPT_NAME, bias=config.train_bias, temperature=config.train_temperature)
        return self._registry.loaded[CONCEPT_NAME].concept

    def _inverse(self, vector: Tensor) -> Tensor:
        return vector.clone() if self.c_inv is None else (self.c_inv @ vector.to(self.c_inv)).to(vector)

    @torch.no_grad()
    def _encode_superclass_prompts(self, prompt_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encode all prompts with the super-class in place of the token, and note where its last token is in each."""
        token, superclass_ids, positions = self.config.placeholder_token, [], []
        for text_encoder, ids in zip(self.family.text_encoders, prompt_ids, strict=True):
            tokens: Any = PlaceholderTokens.existing(text_encoder)
            prompts = [tokens.superclass_prompt(row) for row in ids.tolist()]
            rows = [torch.tensor(prompt.input_ids) for prompt in prompts]
            padding = tokens.tokenizer.pad_token_id
            superclass_ids.append(pad_sequence(rows, batch_first=True, padding_value=padding))
            places = [tokens.positions(row).get(token, ()) for row in ids.tolist()]
            positions.append(
                [[prompt.places[place] for place in row] for prompt, row in zip(prompts, places, strict=True)]
            )
        self._tokens_of_prompt = [
            {token: self.family.row_positions(of_prompt)} for of_prompt in zip(*positions, strict=True)
        ]
        with self._registry.paused_tracking():
            return self.family.encode(superclass_ids).map(lambda part: part.to(self.model.dtype))

    def _move_text_encoders(self, device: torch.device | str) -> None:
        for text_encoder in self.family.text_encoders:
            text_encoder.to(device)

    @contextmanager
    def text_encoders_on_device(self) -> Iterator[None]:
        """Keep the text encoders on the accelerator's device for the body of the statement."""
        self._move_text_encoders(self.accelerator.device)
        try:
            yield
        finally:
            if self.family.joint:
                self._move_text_encoders("cpu")

    def step(self, index: int) -> Tensor:
        """Do one optimizer step and return its mean loss over all processes, 0-dim.

        After the first step the accelerator is never waited for, so that its queue stays filled; reading the loss
        waits. (With a gradient scaler, for fp16, accelerate waits once per step.)

        Args:
            index: number of the step, from 0.

        Raises:
            RuntimeError: if the gradients of the first step are all zero or not finite, or differ when compiled.
        """
        config, accelerator = self.config, self.accelerator
        batch = self._sample(index)
        loss = torch.zeros((), device=accelerator.device)
        for accumulation in range(config.gradient_accumulation_steps):
            start = (accumulation * accelerator.num_processes + accelerator.process_index) * config.train_batch_size
            part = [values[start : start + config.train_batch_size] for values in batch]
            if config.torch_compile and not (self._checked or accumulation):
                self._check_compiled(part)
            part_loss = self._forward(self._compiled_model, *part)
            accelerator.backward(part_loss / config.gradient_accumulation_steps)
            loss += part_loss.detach() / config.gradient_accumulation_steps
        self._average_gradients()
        for group, rate in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = rate * self._lr_factor(index + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return accelerator.reduce(loss, "mean")

    def _sample(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image indices, prompt indices, timesteps and noise of one step, for all processes."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)
        count, latents = self._total_batch_size, self.data.latents
        images = torch.randint(len(latents), (count,), generator=generator)
        prompts = torch.randint(len(TEMPLATES), (count,), generator=generator)
        timesteps = torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)
        own = self._own_prompt[images]
        captioned = (own >= 0) & (torch.rand(count, generator=generator) < CAPTION_SHARE)
        return images, torch.where(captioned, own, prompts), timesteps, noise

    def _forward(self, model: Any, images: Tensor, prompts: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of a batch, 0-dim.

        Args:
            model: the trainer's, or its compiled form.
            images: indices of the images, `(batch,)`, on the CPU like all of the batch.
            prompts: indices of the prompts, `(batch,)`.
            timesteps: of the noise, `(batch,)`.
            noise: `(batch, channels, h, w)`.
        """
        tokens = [self._tokens_of_prompt[prompt] for prompt in prompts.tolist()]
        encoding = self._encode(prompts)
        device = self.accelerator.device
        images, timesteps, noise = (upload(tensor, device) for tensor in (images, timesteps, noise))
        self._registry.prepare(encoding.hidden_states, tokens, encoding.pooled if self.family.joint else None)
        latents = self.data.latents[images]
        noisy = self.schedule.add_noise(latents, noise, timesteps).to(self.model.dtype)
        resolution = latents.shape[-1] * self.family.vae_scale_factor
        with self.accelerator.autocast():
            prediction = self.family.predict(model, noisy, timesteps, encoding, resolution)
        target = prediction_target(self.schedule, latents, noise, timesteps)
        weights = snr_weights(self.schedule, timesteps, self.config.snr_gamma)
        return masked_loss(prediction, target, self.data.masks[images], weights)

    def _encode(self, prompts: Tensor) -> PromptEncoding:
        """Return the text inputs of prompts by their indices, `(batch,)`, in the model's dtype."""
        if self._encoding is not None:
            rows = upload(prompts, self.accelerator.device)
            return self.family.without_padding(self._encoding.map(lambda part: part[rows]))
        # Each prompt is encoded once, and its rows are chosen by a product with a one-hot matrix: the backward pass
        # of indexing adds up repeated rows in whatever order threads come, so that two runs would differ in their
        # bits.
        distinct, rows = prompts.unique(return_inverse=True)
        distinct, one_hot = (upload(part, self.accelerator.device) for part in (distinct, F.one_hot(rows).float()))
        with self._registry.paused_tracking():  # the tokens of each row are known here
            encoding = self.family.encode([ids[distinct] for ids in self.prompt_ids])
        encoding = encoding.map(lambda part: torch.tensordot(one_hot, part.to(one_hot), dims=1))
        return self.family.without_padding(encoding.map(lambda part: part.to(self.model.dtype)))

    def _check_compiled(self, part: list[Tensor]) -> None:
        """Raise RuntimeError if the compiled model gives wrong gradients, as in some releases of torch."""
        gradients = []
        for model in (self.model, self._compiled_model):
            parameters = list(self.parameters.values())
            # Scaled, because gradients may underflow in half precision; the second term keeps a graph where the
            # compiled model has lost it.
            loss = 2**10 * self._forward(model, *part) + 0 * parameters[0].sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat(found))
        eager, compiled = gradients
        cosine = float(F.cosine_similarity(eager, compiled, dim=0))
        # Gradients that are wrong without compilation too are reported by `_average_gradients`.
        if eager.isfinite().all() and eager.any() and not cosine > MIN_COSINE:
            raise RuntimeError(
                f"torch.compile gives other gradients than the model itself (their cosine is {cosine:.2f}) in "
                f"{self.model.dtype}; train without torch_compile, or with another mixed_precision"
            )

    def _average_gradients(self) -> None:
        """Average gradients over processes; raise RuntimeError if those of the first step are zero or not finite."""
        parameters = list(self.parameters.values())
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.accelerator.reduce(torch.cat(gradients), "mean")
        for parameter, gradient in zip(parameters, flat.split([len(p) for p in parameters]), strict=True):
            parameter.grad = gradient
        if not self._checked:
            # A gradient scaler finds its scale by overflowing at first; without one, infinity is an error.
            finite = self.accelerator.scaler is not None or bool(torch.isfinite(flat).all())
            if not finite or not flat.any():
                raise RuntimeError(
                    f"the gradients of the first step are {'all zero' if finite else 'not finite'}, so nothing can be "
                    "trained; some compiled or low-precision models do this, so train with mixed_precision 'no' and "
                    "without torch_compile, or, where that is so, with another base model"
                )
            self._checked = True

    def trained_concept(self, steps: int, **facts: Any) -> PerfusionConcept:
        """Return a copy of the concept on the CPU, to generate with.

        Args:
            steps: number of optimizer steps done.
            facts: more to record about the training in the concept file, beside the settings.

        Raises:
            RuntimeError: if the training diverged, to numbers that no concept file holds.
        """
        if self.family.joint:
            self.concept.inverse_target_input = self._inverse(self.concept.target_input.detach())
        else:
            # i*, the mean hidden state at the placeholder token.
            positions = torch.tensor([places[0] for prompt in self._tokens_of_prompt for places in prompt.values()])
            with torch.no_grad(), self._registry.paused_tracking():
                hidden_states = self.family.encode([ids[: len(TEMPLATES)] for ids in self.prompt_ids]).inputs.float()
            at_token = hidden_states[torch.arange(len(TEMPLATES)), positions[: len(TEMPLATES)]].mean(0)
            self.concept.target_input, self.concept.inverse_target_input = at_token, self._inverse(at_token)
        settings = {name: getattr(self.config, name) for name in _RECORDED}
        try:
            concept = self.concept.detach().to("cpu", copy=True)
            concept.state_dict()
        except ValueError as error:
            raise self.divergence(steps, "its numbers do not fit into a concept file") from error
        return replace(concept, base_model=self.config.base_model, training={"steps": steps} | facts | settings)

    def divergence(self, steps: int, what: str) -> RuntimeError:
        """Return the error of a training whose numbers have become too large.

        Args:
            steps: number of optimizer steps done.
            what: is wrong with them.
        """
        names = ["learning_rate"]
        if self.config.learning_rate is None:
            names = ["value_learning_rate", "embedding_learning_rate"]
        rates = " and ".join(f"{name} (now {getattr(self.config, name)})" for name in names)
        return RuntimeError(f"the training diverged by step {steps}: {what}; begin it anew with a lower {rates}")

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor that a training is resumed from."""
        state = {}
        for name, parameter in self.parameters.items():
            state[name] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                state[f"adam.{key}.{name}"] = value
        if self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler.state_dict()
            state |= {f"scaler.{key}": torch.tensor(scaler[key], dtype=torch.float64) for key in sorted(scaler)}
        return {name: tensor.cpu().contiguous() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from what `state_dict` returned.

        Raises:
            ValueError: if it is of another concept.
        """
        state = dict(state)
        try:
            for name, parameter in self.parameters.items():
                parameter.copy_(state.pop(name))
                self.optimizer.state[parameter] = {
                    key: state.pop(f"adam.{key}.{name}").to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
            if self.accelerator.scaler is not None:
                scaler = self.accelerator.scaler.state_dict()
                kinds = {key: type(value) for key, value in scaler.items()}
                self.accelerator.scaler.load_state_dict(
                    {key: kind(state.pop(f"scaler.{key}").item()) for key, kind in kinds.items()}
                )
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the checkpoint is of another concept or model: {error}") from error
        if state:
            raise ValueError(f"the checkpoint is of another release: it also holds {', '.join(state)}")
