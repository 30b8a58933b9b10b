"""`TrainingConfig`: every setting of a training, described here and nowhere else.

The flags of `perfusion train` are made of it, so this module imports neither torch nor diffusers.
"""

import os
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..concept_file import check_bias, check_temperature, check_token_and_superclass

# Those of diffusers' `SchedulerType` but for `piecewise_constant`, which needs rules that no setting here gives.
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)

# torch's generators take 64 bits, and each step has a seed of its own.
MAX_SEED = 2**32 - 1

# Settings that may change when a training is resumed: they do not change the trained numbers, or name files whose
# content counts (`training_recipe.py`) and not their place.
_NOT_IN_RECIPE = {
    "pretrained_model_name_or_path",
    "instance_data_dir",
    "mask",
    "covariance",
    "initial_embedding",
    "output_dir",
    "max_train_steps",
    "validation_prompt",
    "num_validation_images",
    "validation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "logging_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "hub_private",
    "hub_license",
}

# Settings that may be paths, in which `~` is the home folder.
_PATHS = (
    "pretrained_model_name_or_path",
    "instance_data_dir",
    "output_dir",
    "initial_embedding",
    "covariance",
    "mask",
    "resume_from_checkpoint",
)

# Groups of the settings in the help, by the name in their metadata.
GROUPS = {
    "images": "images of the subject",
    "concept": "concept and base model",
    "training": "training",
    "validation": "validation",
    "sharing": "sharing",
    "machine": "machine",
}


def _required(group: str, help: str) -> Any:
    return field(metadata={"group": group, "help": help})


def _option(group: str, help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass
class TrainingConfig:
    """Settings of a training; defaults are the paper's (Section 4, Appendix A) unless others were measured better.

    The metadata of each field holds its description, which `perfusion train --help` prints, and its group there.

    Raises:
        ValueError: if a setting is out of range.
    """

    pretrained_model_name_or_path: str = _required("concept", "Hub id or folder of the base model.")
    instance_data_dir: str = _required("images", "Folder with images of the subject, about five.")
    placeholder_token: str = _required("concept", "Token that calls the concept in a prompt, such as '<my-cat>'.")
    superclass: str = _required("concept", "Super-class of the subject in plain words, such as 'cat' or 'teddy bear'.")
    output_dir: str = _option(
        "concept",
        "Folder for the concept file, checkpoints and validation images of one concept.",
        "perfusion-concept",
    )
    revision: str | None = _option("concept", "Branch, tag or commit of the base model.")
    variant: str | None = _option("concept", "Variant of the base model's files, such as 'fp16'.")
    initial_embedding: str | None = _option(
        "concept",
        "Textual Inversion file (.safetensors, .bin or .pt) with one vector, from which the token embedding "
        "and the target outputs start; by default they start at the super-class.",
    )
    covariance: str | None = _option(
        "concept",
        "Captions file, or a .npy, .pt or .safetensors matrix, for C; by default captions.txt in the folder of the "
        "base model, or else generated captions.",
    )
    resolution: int | None = _option("images", "Side of the images in pixels; by default the base model's.")
    center_crop: bool = _option(
        "images", "Crop images at their centre instead of at a random place chosen once for each.", False
    )
    random_flip: bool = _option(
        "images", "Train on each image and its mirror image; switch it off for an asymmetric subject.", True
    )
    mask: str = _option(
        "images",
        "Where the subject is: 'alpha' (alpha channel of the images), a folder of masks named like the images, "
        "'clipseg' or the Hub id or folder of a CLIPSeg model, 'attention' (of the base model to the super-class), "
        "'none', or 'auto': the first there is of alpha, a folder 'masks' in instance_data_dir, a CLIPSeg model in "
        "the cache, and attention. Models with joint attention have no masks of attention.",
        "auto",
    )
    train_bias: float = _option("training", "Bias of the gate during training.", 0.75)
    train_temperature: float = _option("training", "Temperature of the gate during training.", 0.1)
    embedding_learning_rate: float = _option(
        "training",
        "Learning rate of the token embedding; in models with joint attention of its hidden state, in units of the "
        "median of the super-class's. With 0 it stays as it begins.",
        0.006,
    )
    value_learning_rate: float = _option("training", "Learning rate of the target outputs.", 0.03)
    learning_rate: float | None = _option(
        "training", "Sets both learning rates: this for the target outputs, a tenth of it for the token embedding."
    )
    scale_lr: bool = _option(
        "training", "Multiply learning rates by processes, gradient accumulation steps and batch size.", False
    )
    lr_scheduler: str = _option("training", f"Schedule of the learning rates: {', '.join(LR_SCHEDULERS)}.", "cosine")
    lr_warmup_steps: int = _option("training", "Steps over which the learning rates rise.", 5)
    train_batch_size: int = _option("training", "Images in a batch, per process.", 16)
    max_train_steps: int = _option("training", "Optimizer steps.", 100)
    gradient_accumulation_steps: int = _option("training", "Batches per optimizer step.", 1)
    snr_gamma: float = _option("training", "Gamma of the min-SNR loss weights (arXiv 2303.09556); 0 for none.", 0.0)
    seed: int = _option("training", "Seed of everything random.", 0)
    checkpointing_steps: int = _option("training", "Steps between checkpoints.", 25)
    checkpoints_total_limit: int | None = _option(
        "training", "Number of checkpoints to keep; the oldest are deleted. By default all are kept."
    )
    resume_from_checkpoint: str | None = _option(
        "training",
        "Checkpoint to resume from: a path, or 'latest' for the last whole one in the output folder, if there is one.",
    )
    validation_prompt: list[str] = field(
        default_factory=list,
        metadata={
            "group": "validation",
            "help": "Prompt for validation images, with the placeholder token; repeatable.",
        },
    )
    num_validation_images: int = _option("validation", "Validation images per prompt.", 4)
    validation_steps: int = _option("validation", "Steps between validation images.", 50)
    report_to: str | None = _option(
        "validation", "Tracker for loss and validation images: tensorboard, wandb, comet_ml or all."
    )
    logging_dir: str = _option("validation", "Folder for trackers, in the output folder.", "logs")
    push_to_hub: bool = _option(
        "sharing", "Push the concept to the Hub, with a card and images of the validation prompts.", False
    )
    hub_model_id: str | None = _option("sharing", "Id of the repository; by default the output folder's name.")
    # Not in the repr, so that no log shows it.
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"group": "sharing", "help": "Token that may write to it; by default the stored one."},
    )
    hub_license: str | None = _option("sharing", "Id of the concept's licence, as the Hub names it: cc-by-4.0, say.")
    hub_private: bool | None = _option(
        "sharing", "Whether a new repository is private; by default as its owner has set."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        "machine", "Precision of the UNet or transformer; by default as accelerate is configured."
    )
    gradient_checkpointing: bool = _option("machine", "Save memory by computing activations twice.", False)
    torch_compile: bool = _option(
        "machine",
        "Compile the model, which takes a while; the first gradients are compared with those of the uncompiled model.",
        False,
    )
    allow_tf32: bool = _option("machine", "Allow TF32 on Ampere and later GPUs during training.", False)

    def __post_init__(self) -> None:
        for name in _PATHS:  # a table, and a flag with "=", come without the shell's expansion
            if (path := getattr(self, name)) is not None:
                setattr(self, name, os.path.expanduser(path))
        for name in (
            "train_batch_size",
            "max_train_steps",
            "gradient_accumulation_steps",
            "num_validation_images",
            "validation_steps",
            "checkpointing_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("resolution", "checkpoints_total_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed is {self.seed}; expected at most {MAX_SEED}")
        if self.learning_rate is not None:
            self.value_learning_rate = self.learning_rate
            self.embedding_learning_rate = self.learning_rate / 10
        for name in ("embedding_learning_rate", "value_learning_rate", "snr_gamma", "lr_warmup_steps", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise ValueError(f"lr_scheduler is {self.lr_scheduler!r}; expected one of {', '.join(LR_SCHEDULERS)}")
        check_token_and_superclass(self.placeholder_token, self.superclass)
        check_bias(self.train_bias)
        check_temperature(self.train_temperature)
        for prompt in self.validation_prompt:
            if self.placeholder_token not in prompt:
                raise ValueError(
                    f"the validation prompt {prompt!r} does not contain the placeholder token {self.placeholder_token}"
                )

    @property
    def base_model(self) -> str:
        """The name of the base model in a concept file: its Hub id, or the last part of its folder."""
        path = Path(self.pretrained_model_name_or_path)
        return path.resolve().name if path.is_dir() else self.pretrained_model_name_or_path

    @property
    def covariance_file(self) -> Path | None:
        """The captions or the matrix for `C`, given or in the base model's folder; None for generated captions."""
        path = Path(self.covariance or Path(self.pretrained_model_name_or_path) / "captions.txt")
        return path if self.covariance or path.is_file() else None

    def recipe(self) -> dict[str, Any]:
        """Return the settings that change the trained numbers; a checkpoint is resumed only under the same ones."""
        recipe = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_RECIPE}
        # A learning rate that falls towards the last step depends on the number of that step.
        return (
            recipe if self.lr_scheduler.startswith("constant") else recipe | {"max_train_steps": self.max_train_steps}
        )


def setting_types() -> dict[str, Any]:
    """Return the type of each setting by its name, without None for optional ones."""
    types_by_name = get_type_hints(TrainingConfig)
    for name, kind in types_by_name.items():
        if get_origin(kind) in (Union, types.UnionType):
            types_by_name[name] = next(part for part in get_args(kind) if part is not type(None))
    return types_by_name
