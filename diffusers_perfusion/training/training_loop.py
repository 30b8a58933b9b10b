"""`train`: from a folder of images to a concept file, with checkpoints, validation and sharing."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..concept import PerfusionConcept
from ..concept_file import WEIGHT_NAME
from ..hub import create_repository
from ..loaders import add_perfusion
from ..model_families import ModelFamily, family_of
from ..placeholder_tokens import known_token
from .checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .covariance import cached_covariance, check_covariance, invert, load_covariance
from .image_captions import training_prompt
from .images import TrainingImage, read_images, to_tensor
from .initial_embedding import initial_embeddings, token_positions
from .loss import snr_weights
from .masks import masks_without_base_model, subject_masks
from .noise_schedule import noise_schedule
from .output_folder import check_output_folder, claim_output_folder
from .trainable import check_trainable
from .trainer import CONCEPT_NAME, PerfusionTrainer
from .training_data import make_training_data
from .training_recipe import training_recipe
from .validation import generate, sheet_path, validate

logger = logging.get_logger(__name__)

# Steps whose losses are read together: to read one is to wait for the accelerator.
READ_STEPS = 10

_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Return an accelerator with the precision, trackers and project folder of a config."""
    return Accelerator(
        # Without this, processes launched on a machine that has only CPUs do not find each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=str(Path(config.output_dir) / config.logging_dir),
    )


def train(pipeline: Any, config: TrainingConfig, accelerator: Any = None) -> PerfusionConcept:
    """Train a concept on a folder of images, write `perfusion.safetensors` into the output folder, and return it.

    The pipeline's models are frozen, moved to the accelerator's device and cast to float32; under mixed precision the
    UNet or transformer to half precision, and text encoders of joint attention are left in their own. Afterwards the
    pipeline has no concept loaded, and its models are where they were and in the precision that they had, but for what
    half precision has rounded.

    Args:
        pipeline: of the base model, such as a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        config: all settings.
        accelerator: an `Accelerator`, which the caller ends, or a `SingleProcess`; by default that of
            `make_accelerator`, which is ended.

    Raises:
        FileNotFoundError: if there is no such checkpoint to resume from.
        ValueError: if the token, the super-class, the images, a model, the checkpoint or the output folder cannot be
            used; before any long work.
        OSError: if the output folder cannot be written: before any long work, or later, with the last checkpoint
            named; or if the concept is to be shared and the Hub refuses.
        RuntimeError: if the gradients of the first step are all zero or not finite, the training diverges, or a
            package is missing.
        KeyboardInterrupt: passed on, after a line that names the checkpoint to resume from.
    """
    if accelerator is None:
        accelerator = make_accelerator(config)
        try:
            return train(pipeline, config, accelerator)
        finally:
            accelerator.end_training()
    if add_perfusion(pipeline).list_perfusion():
        raise ValueError("the pipeline has concepts loaded; call unload_perfusion() before training")
    family = family_of(pipeline)
    check_trainable(pipeline, family, generates=bool(config.validation_prompt))
    model, factor = family.model, family.vae_scale_factor * family.latent_patch_size
    resolution = config.resolution or family.default_resolution
    if resolution % factor:
        raise ValueError(f"resolution is {resolution}; the base model takes multiples of {factor}")
    if not (family.joint or config.embedding_learning_rate):
        logger.warning(
            f"embedding_learning_rate is 0: the token embedding stays as it begins, and as {family.name} has no joint "
            "attention its text encoders are needed at every step, so this saves no memory."
        )
    if family.joint and config.initial_embedding:
        raise ValueError(
            f"initial_embedding is of a token embedding, but {family.name} has joint attention, where a hidden state "
            "is learned instead; train without it"
        )
    # Raises if this model has no such loss.
    snr_weights(noise_schedule(family, pipeline.scheduler), torch.zeros(1, dtype=torch.long), config.snr_gamma)
    if accelerator.is_main_process:
        check_output_folder(config)
    images = read_images(
        config.instance_data_dir, resolution, center_crop=config.center_crop, seed=config.seed, min_side=factor
    )
    prompts = [_own_prompt(image, config) for image in images]
    # Raises if the tokenizers or text encoders cannot take the placeholder token.
    with known_token(family, config.placeholder_token, initial_embeddings(family, config), config.superclass):
        for image, prompt in zip(images, prompts, strict=True):
            if prompt is not None:
                _check_length(family, image, prompt, config)
    if config.covariance and not Path(config.covariance).is_file():
        raise ValueError(
            f"{config.covariance} is not a file; expected captions, or a .npy, .pt or .safetensors matrix, for C"
        )
    masks, mask_source = masks_without_base_model(
        config.mask, images, config.instance_data_dir, config.superclass, attention=not family.joint
    )
    precision = _PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    recipe = training_recipe(config, family, precision, images, prompts, masks, mask_source)
    recipe["num_processes"] = accelerator.num_processes
    start, state, checkpoint = 0, None, None
    if config.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        if checkpoint is not None:
            start, state = load_checkpoint(checkpoint, recipe)
        if start > config.max_train_steps:
            raise ValueError(
                f"{checkpoint} is of step {start}, and max_train_steps is {config.max_train_steps}; give at least "
                f"{start}, or another checkpoint"
            )
    # The model first: where it leaves the accelerator again, there is room for those that come back.
    models = (model, pipeline.vae, *family.text_encoders)
    with claim_output_folder(config) if accelerator.is_main_process else nullcontext(), _left_as_found(models):
        repo_id = None
        if config.push_to_hub and accelerator.is_main_process:
            name = config.hub_model_id or Path(config.output_dir).resolve().name
            repo_id = create_repository(name, private=config.hub_private, token=config.hub_token)

        # Rounded as it is trained on, so that masks do not depend on whether an earlier training has rounded it. A
        # model that makes no masks comes to the device in the trainer, when text encoders may have left it.
        _move(model, model.device if family.joint else accelerator.device, precision)
        for part in (pipeline.vae, *(() if family.joint else (model,))):
            _move(part, accelerator.device, torch.float32)
        for text_encoder in family.text_encoders:
            # The metric of cross-attention depends on the last digits. Joint attention has none, and under mixed
            # precision validation takes any precision.
            own = family.joint and precision != torch.float32
            _move(text_encoder, accelerator.device, text_encoder.dtype if own else torch.float32)
        for part in models:
            part.requires_grad_(False).eval()
        if mask_source == "attention":
            masks, _ = subject_masks(
                mask_source, images, config.instance_data_dir, config.superclass, pipeline, config.seed
            )
        data = make_training_data(
            family, pipeline.vae, to_tensor([image.image for image in images]), masks, config.random_flip, prompts
        )
        c_inv = None
        if not family.joint:  # whose layers have no inputs of their own to compare
            c_inv = invert(check_covariance(_covariance(family, config), family.input_width))
            _move(model, accelerator.device, precision)
        had_checkpointing = model.is_gradient_checkpointing
        if config.gradient_checkpointing or had_checkpointing:
            family.enable_gradient_checkpointing()
        captions = sum(prompt is not None for prompt in prompts)
        facts = {"images": len(images), "captions": captions, "mask": mask_source, "resolution": resolution}
        try:
            with _tf32(config.allow_tf32):
                trainer = PerfusionTrainer(pipeline, config, accelerator, data, c_inv)
                if state is not None:
                    trainer.load_state_dict(state)
                concept = _run(trainer, start, checkpoint, recipe, facts)
        finally:
            pipeline.unload_perfusion()
            if not had_checkpointing:
                model.disable_gradient_checkpointing()
        if repo_id is not None:
            _share(pipeline, config, accelerator, repo_id)
        return concept


def _own_prompt(image: TrainingImage, config: TrainingConfig) -> str | None:
    """Return the prompt of an image's own caption, or None if it has none."""
    if image.caption is None:
        return None
    try:
        return training_prompt(image.caption, config.placeholder_token, config.superclass)
    except ValueError as error:
        raise ValueError(f"{image.path}: {error}") from error


def _check_length(family: ModelFamily, image: TrainingImage, prompt: str, config: TrainingConfig) -> None:
    """Raise ValueError if the token falls off the end of a prompt, or log a warning if other words do."""
    ids = family.tokenize([prompt])
    try:
        token_positions(family, config.placeholder_token, ids)
    except ValueError as error:
        raise ValueError(f"{image.path}: {error}") from error
    shorter = family.tokenize([prompt.rstrip()[:-1]])
    read = [both for part, *both in zip(family.layout, ids, shorter, strict=False) if part.positions is not None]
    if all(torch.equal(*both) for both in read):
        logger.warning(
            f"{image.path}: the caption is longer than the {max(one.shape[1] for one, _ in read)} tokens that the "
            "text encoder reads, so the image is not trained with the words at its end."
        )


def _share(pipeline: Any, config: TrainingConfig, accelerator: Any, repo_id: str) -> None:
    """Push the concept file with images generated from it, so that others generate the same."""
    path = Path(config.output_dir) / WEIGHT_NAME
    for text_encoder in family_of(pipeline).text_encoders:
        text_encoder.to(accelerator.device)
    pipeline.load_perfusion(path, CONCEPT_NAME)
    try:
        rows = generate(pipeline, CONCEPT_NAME, config, accelerator)
    finally:
        pipeline.unload_perfusion()
    samples = [(prompt, image) for prompt, row in zip(config.validation_prompt, rows, strict=True) for image in row]
    try:
        PerfusionConcept.load(path).push_to_hub(
            repo_id,
            samples=samples,
            license=config.hub_license,
            private=config.hub_private,
            token=config.hub_token,
        )
    except OSError as error:
        raise OSError(f"{error} (the concept is trained: share it with `perfusion push {path} {repo_id}`)") from error


def _move(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model, and cast it only if its dtype differs, since diffusers warns about every cast."""
    if model.dtype != dtype:
        model.to(dtype)
    model.to(device)


@contextmanager
def _left_as_found(models: Sequence[Any]) -> Iterator[None]:
    """Bring models back to their devices, and each weight to its precision, after the block."""
    found = [(model, model.device, {name: tensor.dtype for name, tensor in _tensors(model)}) for model in models]
    try:
        yield
    finally:
        for model, device, dtypes in found:
            model.to(device)  # before it is cast, which may make it larger than the accelerator's memory
            _cast(model, dtypes)


def _cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast weights and buffers by name: some text encoders keep a few weights in float32 beside half precision."""
    by_tensor = {id(tensor): dtypes[name] for name, tensor in _tensors(model)}
    model._apply(lambda tensor: tensor.to(by_tensor[id(tensor)]))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # By all their names: to move weights that are one may make them two.
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 for the duration of the block; if not allowed, leave the process as it is."""
    if not allowed:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _covariance(family: ModelFamily, config: TrainingConfig) -> Tensor:
    """Return `C` from the config's file, from captions in the base model's folder, or from generated captions."""
    source = config.covariance_file
    if source is not None and source.suffix in (".npy", ".pt", ".safetensors"):
        return load_covariance(source)
    return cached_covariance(family, source)


def _run(
    trainer: PerfusionTrainer, start: int, checkpoint: Path | None, recipe: dict[str, Any], facts: dict[str, Any]
) -> PerfusionConcept:
    """Run the steps, with checkpoints and validation between them, and write the concept.

    Args:
        trainer: in the state after `start` steps.
        start: number of steps done.
        checkpoint: the checkpoint that is resumed; None if the training begins.
        recipe: to record in checkpoints.
        facts: to record in the concept file.

    Raises:
        OSError: if something cannot be written; it names the last checkpoint, and where a trained concept was kept.
        RuntimeError: if the training diverges.
    """
    config, accelerator = trainer.config, trainer.accelerator
    output_dir = Path(config.output_dir)
    if accelerator.log_with:
        accelerator.init_trackers("perfusion", {k: str(v) for k, v in config.recipe().items()})
    step, last = start, checkpoint
    # Losses are read, and found to be finite, before anything is written or generated.
    intervals = (READ_STEPS, config.checkpointing_steps, config.validation_steps)
    unread: list[Tensor] = []
    progress = tqdm(
        total=config.max_train_steps,
        initial=start,
        desc=f"Training {config.placeholder_token}",
        disable=not accelerator.is_local_main_process,
    )
    try:
        # A stopped training may have its last checkpoint, and not the images of the same step.
        missing = start > 0 and _validates(config, start) and not sheet_path(config, start).exists()
        if missing and accelerator.is_main_process:
            with trainer.text_encoders_on_device():
                validate(trainer.pipeline, CONCEPT_NAME, config, accelerator, start)
        while step < config.max_train_steps:
            unread.append(trainer.step(step))
            step += 1
            progress.update()
            if step == config.max_train_steps or any(step % interval == 0 for interval in intervals):
                losses = _log(accelerator, unread, step)
                unread = []
                if bad := [number for number, loss in losses.items() if not math.isfinite(loss)]:
                    raise trainer.divergence(bad[0], f"the loss is {losses[bad[0]]}")
                progress.set_postfix(loss=f"{losses[step]:.4f}")
            if not accelerator.is_main_process:
                continue
            if step % config.checkpointing_steps == 0:
                last = save_checkpoint(
                    output_dir,
                    step,
                    trainer.state_dict(),
                    recipe,
                    trainer.trained_concept(step, **facts),
                    config.checkpoints_total_limit,
                )
            if _validates(config, step):
                with trainer.text_encoders_on_device():
                    validate(trainer.pipeline, CONCEPT_NAME, config, accelerator, step)
        concept = trainer.trained_concept(step, **facts)
        if accelerator.is_main_process:
            concept.save(output_dir / WEIGHT_NAME)
    except KeyboardInterrupt:
        progress.close()  # or the line below would be written behind the bar
        _log(accelerator, unread, step)
        logger.warning(f"Training was stopped at step {step}; {_resumption(last)}.")
        raise
    except OSError as error:
        done = step == config.max_train_steps
        kept = _keep(trainer.trained_concept(step, **facts), output_dir) if done else None
        found = f"the trained concept is in {kept}; " if kept else ""
        raise OSError(f"{error}; {found}{_resumption(last)}") from error
    finally:
        progress.close()
    accelerator.wait_for_everyone()
    return concept


def _validates(config: TrainingConfig, step: int) -> bool:
    """Return whether a step has validation images."""
    return bool(config.validation_prompt) and step % config.validation_steps == 0


def _resumption(checkpoint: Path | None) -> str:
    """Return how a stopped training goes on."""
    return f"resume {checkpoint} with --resume_from_checkpoint latest" if checkpoint else "it has no checkpoint yet"


def _keep(concept: PerfusionConcept, output_dir: Path) -> Path | None:
    """Write a trained concept into the output folder or else a temporary one; return its path, or None if neither."""
    with suppress(OSError):
        return concept.save(output_dir / WEIGHT_NAME)
    with suppress(OSError):
        return concept.save(Path(tempfile.mkdtemp(prefix="perfusion-")) / WEIGHT_NAME)
    return None


def _log(accelerator: Any, losses: list[Tensor], step: int) -> dict[int, float]:
    """Read the losses of the last steps up to `step`, give them to the trackers, and return them by step."""
    by_step = dict(enumerate(torch.stack(losses).tolist() if losses else [], step - len(losses) + 1))
    for number, loss in by_step.items():
        accelerator.log({"loss": loss}, step=number)
    return by_step
