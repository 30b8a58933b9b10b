"""`fit`: from a folder of pictures to a concept file."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.utils import logging
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention import cross_attention_layers
from ..concept import WEIGHT_NAME, PerfusionConcept
from ..covariance import cached_covariance, check_covariance, invert, load_covariance
from ..families import edited_model, text_encoders
from ..hub import create_repository, push_concept
from ..loaders import add_perfusion
from ..masks import subject_masks
from ..noise import noise_schedule
from ..pictures import read_pictures, to_tensor
from ..text import TextEncoders
from ..vocabulary import Vocabulary
from .checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from .config import FitConfig
from .data import make_subject
from .embedding import initial_embeddings
from .learner import NAME, Learner
from .loss import snr_weights
from .selection import Selection
from .validation import draw, validate

logger = logging.get_logger(__name__)

# Steps whose losses are read at once: to read one is to wait for the accelerator.
READ_STEPS = 10

_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(config: FitConfig) -> Accelerator:
    """The accelerator that a config asks for."""
    return Accelerator(
        # Without this, processes launched on a machine that has only CPUs do not find each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=str(Path(config.output_dir) / config.logging_dir),
    )


def fit(pipeline: Any, config: FitConfig, accelerator: Accelerator | None = None) -> PerfusionConcept:
    """Fit a concept to a folder of pictures, and write `perfusion.safetensors` into the output folder.

    It is the concept as it is after the last step, or with `config.select_by` after the step that scores best.

    The pipeline's models are frozen, moved to the accelerator's device and, but for the UNet under mixed precision,
    cast to float32. When the fit is over, the pipeline has no concept loaded.

    Args:
        pipeline: of the base model, such as a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        config: all settings.
        accelerator: processes, device, precision and trackers; by default as `make_accelerator`.

    Raises:
        FileNotFoundError: if there is no such checkpoint to resume from.
        ValueError: if the words, the pictures, a model or the checkpoint cannot be used; before any long work.
        OSError: if the concept is to be shared and the Hub refuses: before any long work, or when the file is written.
        RuntimeError: if the gradients of the first step are all zero or not finite, or a package is missing.
        KeyboardInterrupt: passed on, after a line that says which checkpoint the fit can go on from.
    """
    accelerator = accelerator or make_accelerator(config)
    if add_perfusion(pipeline).list_perfusion():
        raise ValueError("the pipeline has concepts loaded; call unload_perfusion() before a fit")
    model, factor = edited_model(pipeline), pipeline.vae_scale_factor
    resolution = config.resolution or model.config.sample_size * factor
    if resolution % factor:
        raise ValueError(f"resolution is {resolution}; the base model takes multiples of {factor}")
    # Whether there is such a loss of this model.
    snr_weights(noise_schedule(pipeline.scheduler), torch.zeros(1, dtype=torch.long), config.snr_gamma)
    texts = text_encoders(pipeline)
    Vocabulary(texts).add(config.placeholder_token, initial_embeddings(texts, config), config.superclass)
    pictures = read_pictures(
        config.instance_data_dir, resolution, center_crop=config.center_crop, seed=config.seed, smallest=factor
    )
    if config.covariance and not Path(config.covariance).is_file():
        raise ValueError(
            f"{config.covariance} is not a file; expected captions, or a .npy, .pt or .safetensors matrix, for C"
        )
    start, state, checkpoint = 0, None, None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        start, state = load_checkpoint(checkpoint, _recipe(config, accelerator))
    selection = None
    if config.select_by and accelerator.is_main_process:
        selection = Selection(config, [picture.image for picture in pictures], accelerator.device)
    repo_id = None
    if accelerator.is_main_process:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        if config.push_to_hub:
            name = config.hub_model_id or Path(config.output_dir).resolve().name
            repo_id = create_repository(name, private=config.hub_private, token=config.hub_token)

    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    precision = _PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    # Rounded as it is trained on, so that masks do not tell whether an earlier fit has left it so.
    _move(model, accelerator.device, precision)
    for part in (pipeline.vae, *texts.models, model):
        # Text encoders stay in float32 under mixed precision, for the metric lives on its last digits.
        _move(part, accelerator.device, torch.float32)
        part.requires_grad_(False).eval()
    masks, mask_source = subject_masks(
        config.mask, pictures, config.instance_data_dir, config.superclass, pipeline, config.seed
    )
    subject = make_subject(pipeline.vae, to_tensor([picture.image for picture in pictures]), masks, config.random_flip)
    c_inv = invert(check_covariance(_covariance(texts, config), _input_width(model)))
    _move(model, accelerator.device, precision)
    checkpointed = model.is_gradient_checkpointing
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    facts = {"pictures": len(pictures), "mask": mask_source, "resolution": resolution}
    try:
        learner = Learner(pipeline, config, accelerator, subject, c_inv)
        if state is not None:
            learner.load_state_dict(state)
            if selection is not None:
                selection.load_state_dict(state)
        concept = _run(learner, selection, start, checkpoint, facts)
    finally:
        pipeline.unload_perfusion()
        if not checkpointed:
            model.disable_gradient_checkpointing()
        accelerator.end_training()
    if repo_id is not None:
        _share(pipeline, config, accelerator, repo_id)
    return concept


def _share(pipeline: Any, config: FitConfig, accelerator: Accelerator, repo_id: str) -> None:
    """Push the concept as it is in its file, with pictures drawn from there, so that others draw the same."""
    path = Path(config.output_dir) / WEIGHT_NAME
    pipeline.load_perfusion(path, NAME)
    try:
        rows = draw(pipeline, NAME, config.validation_prompt, config.num_validation_images, config.seed, accelerator)
    finally:
        pipeline.unload_perfusion()
    samples = [
        (prompt, picture) for prompt, row in zip(config.validation_prompt, rows, strict=True) for picture in row
    ]
    try:
        push_concept(
            PerfusionConcept.load(path), repo_id, samples=samples, private=config.hub_private, token=config.hub_token
        )
    except OSError as error:
        raise OSError(f"{error} (the fit is over: `perfusion push {path} {repo_id}`)") from error


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast a model; not cast where there is nothing to cast, since diffusers warns of each cast."""
    if next(model.parameters()).dtype != dtype:
        model.to(dtype)
    model.to(device)


def _input_width(model: Any) -> int:
    """Width of what the cross-attention layers of a model get, `d`."""
    return next(iter(cross_attention_layers(model).values())).cross_attention_dim


def _covariance(texts: TextEncoders, config: FitConfig) -> Tensor:
    """`C` from where the config says, or from captions that lie with the base model, or from generated ones."""
    source = Path(config.covariance or Path(config.pretrained_model_name_or_path) / "captions.txt")
    if source.suffix in (".npy", ".pt", ".safetensors"):
        return load_covariance(source)
    return cached_covariance(texts, source if source.is_file() else None)


def _run(
    learner: Learner, selection: Selection | None, start: int, checkpoint: Path | None, facts: dict[str, Any]
) -> PerfusionConcept:
    """The steps, with what happens between them; `checkpoint` is what they go on from."""
    config, accelerator = learner.config, learner.accelerator
    output_dir = Path(config.output_dir)
    if accelerator.log_with:
        accelerator.init_trackers("perfusion", {k: str(v) for k, v in config.recipe().items()})
    step, last = start, checkpoint
    # Before anything is made of what was learned, see that it is finite.
    ends = (READ_STEPS, config.checkpointing_steps, config.selection_steps, config.validation_steps)
    unread: list[Tensor] = []
    progress = tqdm(
        total=config.max_train_steps, initial=start, desc="Steps", disable=not accelerator.is_local_main_process
    )
    try:
        while step < config.max_train_steps:
            unread.append(learner.step(step))
            step += 1
            progress.update()
            if step == config.max_train_steps or any(step % end == 0 for end in ends):
                losses = _log(accelerator, unread, step)
                unread = []
                if bad := [number for number, loss in losses.items() if not math.isfinite(loss)]:
                    raise RuntimeError(f"the loss of step {bad[0]} is {losses[bad[0]]}; lower the learning rates")
                progress.set_postfix(loss=f"{losses[step]:.4f}")
            if not accelerator.is_main_process:
                continue
            # Before the checkpoint, which holds the scores as well.
            if selection is not None and step % config.selection_steps == 0:
                selection.score(learner, step)
            if step % config.checkpointing_steps == 0:
                concept = learner.result(**_how(config, step, facts))
                last = save_checkpoint(
                    output_dir,
                    step,
                    learner.state_dict() | (selection.state_dict() if selection is not None else {}),
                    _recipe(config, accelerator),
                    concept,
                    config.checkpoints_total_limit,
                )
            if config.validation_prompt and step % config.validation_steps == 0:
                validate(learner.pipeline, NAME, config, accelerator, step)
        # In no checkpoint, if it is out of turn: a fit that goes on to later steps would not have scored this one.
        if selection is not None and step not in selection.scores:
            selection.score(learner, step)
    except KeyboardInterrupt:
        _log(accelerator, unread, step)
        logger.warning(
            f"The fit was stopped at step {step}. "
            + (f"Go on from {last} with --resume_from_checkpoint latest." if last else "It has no checkpoint yet.")
        )
        raise
    finally:
        progress.close()
    if config.select_by:
        chosen = [step, learner.state_dict()] if selection is None else [selection.chosen, selection.best]
        step, state = broadcast_object_list(chosen)  # only the main process has scores
        learner.load_state_dict(state)
        facts = facts | {"select_by": config.select_by}
    if selection is not None:
        logger.warning(selection.outcome)
    concept = learner.result(**_how(config, step, facts))
    if accelerator.is_main_process:
        concept.save(output_dir / WEIGHT_NAME)
    accelerator.wait_for_everyone()
    return concept


def _log(accelerator: Accelerator, losses: list[Tensor], step: int) -> dict[int, float]:
    """Read the losses of the steps up to this one, and give them to the trackers; by step."""
    read = dict(enumerate(torch.stack(losses).tolist() if losses else [], step - len(losses) + 1))
    for number, loss in read.items():
        accelerator.log({"loss": loss}, step=number)
    return read


def _recipe(config: FitConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What a checkpoint must have been made with to go on: the settings, and how many processes share a batch."""
    return config.recipe() | {"num_processes": accelerator.num_processes}


def _how(config: FitConfig, step: int, facts: dict[str, Any]) -> dict[str, Any]:
    """How a concept was fitted, for its file: nothing of the machine it was done on."""
    settings = (
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
    return {"steps": step} | facts | {name: getattr(config, name) for name in settings}
