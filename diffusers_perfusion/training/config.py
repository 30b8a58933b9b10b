"""`FitConfig`: every setting of a fit, described here and nowhere else; the command line is made of it."""

import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffusers.optimization import SchedulerType

from ..concept import check_bias, check_temperature, check_words

_CRITERIA = ("harmonic_mean", "identity", "text")

_SELECTION_PROMPTS = (
    "a {} on the beach",
    "a {} in the snow",
    "a {} wearing a top hat",
    "a {} next to an umbrella",
    "a black and white photo of a {}",
)

# `piecewise_constant` needs rules that no setting here gives.
_SCHEDULES = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]

# Settings that say where things go or how long a fit lasts, and so may change when a fit is resumed.
_NOT_IN_RESULT = {
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
}


def _option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass
class FitConfig:
    """Settings of a fit; defaults are the paper's (Section 4, Appendix A) but where others were measured to be better.

    Each field's description is in its metadata, and printed by `perfusion fit --help`.

    Raises:
        ValueError: if a setting is out of range.
    """

    pretrained_model_name_or_path: str = _required("Id on the Hub, or folder, of the base model.")
    instance_data_dir: str = _required("Folder with the pictures of the subject; about five.")
    placeholder_token: str = _required("Word that will call the concept in a prompt, such as '<my-cat>'.")
    superclass: str = _required("The super-category in plain words, such as 'cat' or 'teddy bear'.")
    output_dir: str = _option("Folder for the concept file, checkpoints and validation pictures.", "perfusion-concept")
    revision: str | None = _option("Branch, tag or commit of the base model.")
    variant: str | None = _option("Variant of the base model's files, such as 'fp16'.")
    resolution: int | None = _option("Side of the pictures in pixels; by default the base model's.")
    center_crop: bool = _option("Crop pictures at their centre, and not at a place drawn once for each.", False)
    random_flip: bool = _option("Show half of the pictures mirrored; switch it off for an asymmetric subject.", True)
    mask: str = _option(
        "Where the subject is: 'alpha' (the pictures' own), a folder of masks named like the pictures, 'clipseg' or "
        "the Hub id or folder of a CLIPSeg model, 'attention' (the base model's to the super-category), 'none', or "
        "'auto': the first of alpha, a folder 'masks' beside the pictures, a CLIPSeg model in the cache, attention.",
        "auto",
    )
    covariance: str | None = _option(
        "Captions file, or a .npy, .pt or .safetensors matrix, for C; by default captions.txt in the folder of the "
        "base model, or else captions are generated."
    )
    initial_embedding: str | None = _option(
        "Textual Inversion file (.safetensors, .bin or .pt) of one vector that the word starts from, and the target "
        "input and outputs with it; by default all start at the super-category."
    )
    train_bias: float = _option("Bias of the gate while fitting.", 0.75)
    train_temperature: float = _option("Temperature of the gate while fitting.", 0.1)
    embedding_learning_rate: float = _option("Learning rate of the word embedding; the paper's is 0.006.", 0.003)
    value_learning_rate: float = _option("Learning rate of the target outputs.", 0.03)
    learning_rate: float | None = _option(
        "Sets both learning rates: this for the target outputs and a tenth of it for the word embedding."
    )
    scale_lr: bool = _option("Multiply learning rates by processes, gradient accumulation and batch size.", False)
    lr_scheduler: str = _option("Schedule of the learning rates, as diffusers names them.", "constant_with_warmup")
    lr_warmup_steps: int = _option("Steps over which the learning rates rise.", 5)
    train_batch_size: int = _option("Pictures a process sees at once.", 16)
    max_train_steps: int = _option("Optimizer steps.", 250)
    gradient_accumulation_steps: int = _option("Batches that make one optimizer step.", 1)
    gradient_checkpointing: bool = _option("Save memory by computing activations twice.", False)
    snr_gamma: float = _option("Gamma of the min-SNR loss weights (arXiv 2303.09556); 0 for none.", 0.0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        "Precision of the UNet; by default what accelerate is configured with."
    )
    torch_compile: bool = _option(
        "Compile the model, which takes a while; the first gradients are compared with those without.", False
    )
    allow_tf32: bool = _option("Allow TF32 on Ampere GPUs.", False)
    report_to: str | None = _option("Tracker for loss and validation pictures: tensorboard, wandb, comet_ml or all.")
    logging_dir: str = _option("Folder for trackers, below the output folder.", "logs")
    validation_prompt: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompt for validation pictures, with the concept's word; repeatable."},
    )
    num_validation_images: int = _option("Validation pictures for each prompt.", 4)
    validation_steps: int = _option("Steps between validation pictures.", 50)
    select_by: Literal["harmonic_mean", "identity", "text"] | None = _option(
        "Keep the step with the best score: 'identity' (like the pictures of the subject), 'text' (like the prompt), "
        "or the 'harmonic_mean' of both (the paper's). By default the last step is kept."
    )
    selection_prompt: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompt for the pictures that are scored, with the concept's word; repeatable. By default "
            f"{len(_SELECTION_PROMPTS)}: places, something worn, a companion, a style."
        },
    )
    num_selection_images: int = _option("Scored pictures for each prompt.", 2)
    selection_steps: int = _option("Steps between scores; the last step is always scored.", 25)
    clip_model: str = _option(
        "Id on the Hub, or folder, of the CLIP that scores 'text'.", "openai/clip-vit-large-patch14"
    )
    identity_model: str = _option(
        "Id on the Hub, or folder, of the DINO-style model that scores 'identity'; the same as clip_model for CLIP-I.",
        "facebook/dinov2-base",
    )
    checkpointing_steps: int = _option("Steps between checkpoints.", 25)
    checkpoints_total_limit: int | None = _option("How many checkpoints to keep; the oldest go. By default all.")
    resume_from_checkpoint: str | None = _option(
        "Checkpoint to go on from: its path, or 'latest' in the output folder."
    )
    seed: int = _option("Seed of everything random.", 0)
    push_to_hub: bool = _option(
        "Share the concept on the Hub, with a card and pictures of the validation prompts.", False
    )
    hub_model_id: str | None = _option("Id of its repository; by default the output folder's name.")
    # Not in the repr either, so that no log shows it.
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token that may write there; by default the stored one."}
    )
    hub_private: bool | None = _option("Whether a new repository is private; by default as the owner's are.")

    def __post_init__(self) -> None:
        for name in (
            "train_batch_size",
            "max_train_steps",
            "gradient_accumulation_steps",
            "num_validation_images",
            "validation_steps",
            "num_selection_images",
            "selection_steps",
            "checkpointing_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("resolution", "checkpoints_total_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.learning_rate is not None:
            self.value_learning_rate = self.learning_rate
            self.embedding_learning_rate = self.learning_rate / 10
        for name in ("embedding_learning_rate", "value_learning_rate", "snr_gamma", "lr_warmup_steps", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected no negative number")
        if self.lr_scheduler not in _SCHEDULES:
            raise ValueError(f"lr_scheduler is {self.lr_scheduler!r}; expected one of {', '.join(_SCHEDULES)}")
        check_words(self.placeholder_token, self.superclass)
        check_bias(self.train_bias)
        check_temperature(self.train_temperature)
        if self.select_by not in (None, *_CRITERIA):
            raise ValueError(f"select_by is {self.select_by!r}; expected one of {', '.join(_CRITERIA)}")
        if not self.selection_prompt:
            self.selection_prompt = [prompt.format(self.placeholder_token) for prompt in _SELECTION_PROMPTS]
        for kind, prompts in (("validation", self.validation_prompt), ("selection", self.selection_prompt)):
            for prompt in prompts:
                if self.placeholder_token not in prompt:
                    raise ValueError(f"the {kind} prompt {prompt!r} does not hold the word {self.placeholder_token}")

    @property
    def base_model(self) -> str:
        """The base model as a concept file names it: its id on the Hub, or of a folder the last part."""
        path = Path(self.pretrained_model_name_or_path)
        return path.resolve().name if path.is_dir() else self.pretrained_model_name_or_path

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the result; a checkpoint goes on only under the same ones."""
        recipe = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_RESULT}
        # A rate that falls towards the last step depends on which step that is.
        return (
            recipe if self.lr_scheduler.startswith("constant") else recipe | {"max_train_steps": self.max_train_steps}
        )


def setting_kinds() -> dict[str, Any]:
    """The type of each setting by its name, without None where that is allowed as well."""
    kinds = get_type_hints(FitConfig)
    for name, kind in kinds.items():
        if get_origin(kind) in (Union, types.UnionType):
            kinds[name] = next(part for part in get_args(kind) if part is not type(None))
    return kinds
