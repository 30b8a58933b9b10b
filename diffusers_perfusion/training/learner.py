"""`Learner`: a concept that learns, and what one step of learning is."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..attention import cross_attention_layers, get_state
from ..concept import PerfusionConcept
from ..families import edited_model, family_of, text_encoders
from ..noise import noise_schedule
from ..text import TEMPLATES, superclass_input
from .config import FitConfig
from .data import Subject
from .embedding import initial_embeddings, word_input
from .loss import masked_loss, prediction_target, snr_weights

# Slower than the paper's 0.99, for a little more identity at equal text alignment. At 1 two concepts of one
# super-category would be parallel, and could not be in one prompt.
EMA_DECAY = 0.997
NAME = "concept"

# Between gradients with torch.compile and without: in bfloat16 both are rounded, and differently.
MIN_COSINE = 0.9


class Learner:
    """A concept on a pipeline, of which only `v*` and the `o*_V` have gradients (paper Section 4).

    Everything random in a step comes from the seed and the step's number, for the batch of all processes at once: a
    fit can go on anywhere, and two processes see what one with twice the batch sees.

    Args:
        pipeline: of the base model, frozen and on the accelerator's device; the concept is loaded on it.
        config: settings.
        accelerator: processes, device and precision.
        subject: what it learns from.
        c_inv: `C⁻¹`, `(d, d)` in float64.

    Attributes:
        concept: as it stands; its tensors are the parameters.
    """

    def __init__(self, pipeline: Any, config: FitConfig, accelerator: Accelerator, subject: Subject, c_inv: Tensor):
        self.pipeline, self.config, self.accelerator = pipeline, config, accelerator
        # Apple's accelerator has no float64.
        self.subject, self.c_inv = subject, c_inv.to("cpu" if accelerator.device.type == "mps" else accelerator.device)
        self.scheduler = noise_schedule(pipeline.scheduler)
        self.texts, self.family, self.model = text_encoders(pipeline), family_of(pipeline), edited_model(pipeline)
        self.concept = self._start()
        prompt_ids = self.texts.tokenize([template.format(config.placeholder_token) for template in TEMPLATES])
        self.word_at = self._state.words.positions(prompt_ids, config.placeholder_token).to(accelerator.device)
        self.prompt_ids = [ids.to(accelerator.device) for ids in prompt_ids]

        outputs = self.concept.target_outputs
        names = ("word_embedding", "word_embedding_2")
        self.parameters = dict(zip(names, self.concept.word_embeddings, strict=False)) | {
            f"target_outputs.{layer}": output for layer, output in outputs.items()
        }
        self._rates = [config.value_learning_rate, config.embedding_learning_rate]
        if config.scale_lr:
            self._rates = [rate * self._batch_of_all for rate in self._rates]
        groups = [list(outputs.values()), self.concept.word_embeddings]
        adam = torch.optim.Adam([{"params": params} for params in groups])
        # Only its function of the step is used, so there is no state of it to resume.
        self._schedule = get_scheduler(
            config.lr_scheduler,
            torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps + 1,  # or the rate of the last step may be zero
        ).lr_lambdas[0]
        self.optimizer = accelerator.prepare(adam)
        self._compiled = self.model
        if config.torch_compile:
            torch.compiler.reset()  # what fits before this one compiled counts towards how often torch will do it
            self._compiled = torch.compile(self.model)
        self._checked = False

    @property
    def _state(self) -> Any:
        return get_state(self.model)

    @property
    def _batch_of_all(self) -> int:
        """Pictures in one optimizer step."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _start(self) -> PerfusionConcept:
        """`v*` at its embeddings, `i*` at their encoding and `o*_V` at its values; loaded and active."""
        pipeline, config = self.pipeline, self.config
        i_start = i_super = superclass_input(self.texts, config.superclass)
        embeddings = [nn.Parameter(vector.to(i_super)) for vector in initial_embeddings(self.texts, config)]
        if config.initial_embedding is not None:
            i_start = word_input(self.texts, config.placeholder_token, embeddings, config.superclass)
        with torch.no_grad():
            inputs = i_start.to(self.model.dtype)
            outputs = {name: layer.to_v(inputs).float() for name, layer in cross_attention_layers(self.model).items()}
        pipeline.load_perfusion(
            PerfusionConcept(
                placeholder_token=config.placeholder_token,
                superclass=config.superclass,
                word_embedding=embeddings[0],
                word_embedding_2=embeddings[1] if len(embeddings) > 1 else None,
                target_input=i_start.clone(),
                inverse_target_input=self._inverse(i_start),
                superclass_input=i_super,
                target_outputs={layer: nn.Parameter(output) for layer, output in outputs.items()},
            ),
            concept_name=NAME,
        )
        pipeline.set_perfusion(NAME, bias=config.train_bias, temperature=config.train_temperature)
        return self._state.loaded[NAME].concept

    def _inverse(self, target_input: Tensor) -> Tensor:
        return (self.c_inv @ target_input.to(self.c_inv)).to(target_input)

    def step(self, index: int) -> Tensor:
        """One optimizer step, and its mean loss over all processes, 0-dim.

        After the first it does not wait for the accelerator, which has the next step's work before this one is done;
        to read the loss is to wait. (With a gradient scaler, for fp16, accelerate waits once a step.)

        Args:
            index: number of the step, from 0.

        Raises:
            RuntimeError: if the gradients of the first step are all zero or not finite, or others when compiled.
        """
        config, accelerator = self.config, self.accelerator
        drawn = self._draw(index)
        loss, encoding = torch.zeros((), device=accelerator.device), torch.zeros_like(self.concept.target_input)
        for micro in range(config.gradient_accumulation_steps):
            first = (micro * accelerator.num_processes + accelerator.process_index) * config.train_batch_size
            part = [values[first : first + config.train_batch_size] for values in drawn]
            if config.torch_compile and not (self._checked or micro):
                self._check_compiled(part)
            part_loss, part_encoding = self._forward(self._compiled, *part)
            accelerator.backward(part_loss / config.gradient_accumulation_steps)
            loss += part_loss.detach() / config.gradient_accumulation_steps
            encoding += part_encoding / config.gradient_accumulation_steps
        self._share_gradients()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._schedule(index + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # i* ← decay · i* + (1 − decay) · mean encoding at the concept's word (paper Section 4), outside the graph.
        encoding = accelerator.reduce(encoding, "mean")
        self.concept.target_input = EMA_DECAY * self.concept.target_input + (1 - EMA_DECAY) * encoding
        self.concept.inverse_target_input = self._inverse(self.concept.target_input)
        return accelerator.reduce(loss, "mean")

    def _draw(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, prompts, timesteps and noise of one step, for all processes."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)
        count, latents = self._batch_of_all, self.subject.latents
        return (
            torch.randint(len(latents), (count,), generator=generator),
            torch.randint(len(TEMPLATES), (count,), generator=generator),
            torch.randint(self.scheduler.config.num_train_timesteps, (count,), generator=generator),
            torch.randn((count, *latents.shape[1:]), generator=generator),
        )

    def _forward(
        self, model: Any, pictures: Tensor, prompts: Tensor, timesteps: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and the mean encoding at the concept's word, `(d,)`, out of the graph.

        `model` is the learner's, or what it was compiled to; what was drawn is on the CPU.
        """
        # Each template is encoded once. Its rows are chosen by a product with ones and zeros: the backward of indexing
        # adds up repeated rows in whatever order threads come, and a fit that goes on would not end in the same bits.
        templates, rows = prompts.unique(return_inverse=True)
        device = self.accelerator.device
        pictures, prompts, templates, chosen, timesteps, noise = (
            _upload(drawn, device)
            for drawn in (pictures, prompts, templates, F.one_hot(rows).float(), timesteps, noise)
        )
        with self._state.words.unheard():  # which words there are is known here
            encoding = self.texts.encode([ids[templates] for ids in self.prompt_ids])
        encoding = encoding.map(lambda part: torch.tensordot(chosen, part.to(chosen), dims=1))
        at_word = encoding.inputs[torch.arange(len(prompts), device=device), self.word_at[prompts]].detach().mean(0)
        encoding = encoding.map(lambda part: part.to(self.model.dtype))
        self._state.prepare(encoding.states, [(self.config.placeholder_token,)] * len(prompts))
        latents = self.subject.latents[pictures]
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(self.model.dtype)
        conditions = self.family.conditions(self.model, encoding, latents.shape[-1] * self.pipeline.vae_scale_factor)
        with self.accelerator.autocast():
            prediction = model(noisy, timestep=timesteps, encoder_hidden_states=encoding.states, **conditions)
        # Some models predict a variance as well, in channels behind.
        prediction = prediction.sample[:, : latents.shape[1]]
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        weights = snr_weights(self.scheduler, timesteps, self.config.snr_gamma)
        return masked_loss(prediction, target, self.subject.masks[pictures], weights), at_word

    def _check_compiled(self, part: list[Tensor]) -> None:
        """See that the compiled model has the gradients of the model itself; some releases of torch lose them."""
        gradients = []
        for model in (self.model, self._compiled):
            learning = list(self.parameters.values())
            # Scaled, or those of half precision may vanish; from nothing, where the graph is lost, come zeros.
            loss = 2**10 * self._forward(model, *part)[0] + 0 * learning[0].sum()
            found = torch.autograd.grad(loss, learning, allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat(found))
        eager, compiled = gradients
        cosine = float(F.cosine_similarity(eager, compiled, dim=0))
        # What is wrong without compiling is found in any fit.
        if eager.isfinite().all() and eager.any() and not cosine > MIN_COSINE:
            raise RuntimeError(
                f"torch.compile gives other gradients than the model itself (their cosine is {cosine:.2f}) in "
                f"{self.model.dtype}; fit without torch_compile, or with another mixed_precision"
            )

    def _share_gradients(self) -> None:
        """Average gradients over processes, and see at the first step that there are any."""
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
                    "learned; some compiled or low-precision models do this, so try mixed_precision 'no' without "
                    "torch.compile"
                )
            self._checked = True

    def result(self, **training: Any) -> PerfusionConcept:
        """A copy of the concept as it stands, to generate with.

        Args:
            training: how it was fitted.
        """
        concept = self.concept.detach().to("cpu", copy=True)
        return replace(concept, base_model=self.config.base_model, training=training)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that a fit goes on from."""
        state = {"target_input": self.concept.target_input}
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
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: if it is of another concept.
        """
        state = dict(state)
        try:
            self.concept.target_input.copy_(state.pop("target_input"))
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
        self.concept.inverse_target_input = self._inverse(self.concept.target_input)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting until it is there."""
    # From memory that is not pinned an accelerator may be waited for; Apple's may read what has gone meanwhile.
    if device.type in ("cpu", "mps"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
