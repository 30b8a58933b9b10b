"""Textual Inversion, LoRA and Custom Diffusion, trained on the base model and the images that Perfusion is trained on.

Each is set up, saved and loaded by diffusers' and peft's own code, with what diffusers' example scripts train and how:
`textual_inversion.py`, `train_dreambooth_lora.py`, for FLUX `train_dreambooth_lora_flux.py`, and
`train_custom_diffusion.py`. The templates, the schedule and, for a seed, every image, its template, timestep and noise
are those of a Perfusion training. As in the scripts the loss sees all of an image, unless the subject is read with its
masks. No method gets images of the super-class besides (prior preservation), since Perfusion gets none.

    saved = METHODS["lora"].train(
        pipeline, read_subject(pipeline, folder, side=64), "<my-robot>", "robot",
        learning_rate=1e-3, steps=150, save_at=[50, 150], output_dir="trainings/lora", rank=4,
    )
    METHODS["lora"].load(fresh_pipeline, saved[150])
    fresh_pipeline(prompt.format(METHODS["lora"].phrase("<my-robot>", "robot")))
"""

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_perfusion.model_families import cross_attention_layers, family_of
from diffusers_perfusion.model_families.base import edited_model, embedding_table
from diffusers_perfusion.training.images import read_images, to_tensor
from diffusers_perfusion.training.loss import masked_loss, prediction_target, snr_weights
from diffusers_perfusion.training.masks import subject_masks
from diffusers_perfusion.training.noise_schedule import noise_schedule
from diffusers_perfusion.training.superclass import TEMPLATES, superclass_embeddings
from diffusers_perfusion.training.training_data import make_training_data

EMBEDDING_FILE = "learned_embeds.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
KV_FILE = "pytorch_custom_diffusion_weights.bin"

ADAMW = {"betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}  # of all three scripts
PROJECTIONS = ["to_k", "to_q", "to_v", "to_out.0"]
FLUX_PROJECTIONS = [
    *(f"attn.{name}" for name in PROJECTIONS),
    *(f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")),
    *(f"{part}.net.{name}" for part in ("ff", "ff_context") for name in ("0.proj", "2")),
]
MAX_NORM = 1.0  # of the gradients, in the scripts of LoRA and Custom Diffusion
WARMUP = 5
SNR_GAMMA = 0.0


@torch.no_grad()
def read_subject(pipeline, folder, side, flip=True, masked=False):
    """Return the latents of a folder of images, `side × side`, with its masks or, as in the scripts, without."""
    images = read_images(folder, side)
    masks, _ = subject_masks(str(Path(folder) / "masks") if masked else "none", images, folder, "", pipeline)
    return make_training_data(
        family_of(pipeline), pipeline.vae, to_tensor([image.image for image in images]), masks, flip
    )


def freeze(pipeline):
    """Freeze the models, so that only what a method adds is trained."""
    for model in (pipeline.vae, *family_of(pipeline).text_encoders, edited_model(pipeline)):
        model.requires_grad_(False).eval()


def train(
    pipeline,
    subject,
    phrase,
    parameters,
    save,
    *,
    learning_rate,
    steps,
    output_dir,
    save_at=(),
    seed=0,
    batch_size=16,
    bf16=False,
    max_norm=None,
    lr_scheduler="constant_with_warmup",
    each_prompt=False,
):
    """Run the training steps of any method; returns `{step: folder}`.

    Args:
        pipeline: of the base model, with `parameters` in it.
        subject: what it is trained on, as `read_subject`.
        phrase: what names the subject in the templates.
        parameters: what is trained.
        save: called with a folder, writes what was trained into it.
        learning_rate: of all parameters.
        steps: how many.
        output_dir: for folders `step-<n>`.
        save_at: after which steps to save; after the last if empty.
        seed: of images, templates, timesteps and noise.
        batch_size: images in a step.
        bf16: run the UNet in it; the text encoder, the parameters and the loss stay in float32.
        max_norm: of the gradients.
        lr_scheduler: schedule of the learning rate, as a Perfusion training's.
        each_prompt: encode the prompt of each image, as the scripts do, and not each template once.
    """
    family = family_of(pipeline)
    device = family.model.device
    schedule = noise_schedule(family, pipeline.scheduler)
    prompt_ids = [ids.to(device) for ids in family.tokenize([template.format(phrase) for template in TEMPLATES])]
    side = subject.latents.shape[-1] * family.vae_scale_factor
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, **ADAMW)
    lr_factor = get_scheduler(
        lr_scheduler, optimizer, num_warmup_steps=WARMUP, num_training_steps=steps + 1
    ).lr_lambdas[0]
    saved = {}
    for index in range(steps):
        # In the order of a Perfusion training's samples, so that both see the same images and templates for a seed.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        sampled = (
            torch.randint(len(subject.latents), (batch_size,), generator=generator),
            torch.randint(len(TEMPLATES), (batch_size,), generator=generator),
            torch.randint(schedule.config.num_train_timesteps, (batch_size,), generator=generator),
            torch.randn((batch_size, *subject.latents.shape[1:]), generator=generator),
        )
        images, prompts, timesteps, noise = (values.to(device) for values in sampled)

        if each_prompt:
            encoding = family.encode([ids[prompts] for ids in prompt_ids])
        else:
            chosen = F.one_hot(prompts, len(TEMPLATES)).float()
            encoding = family.encode(prompt_ids)
            encoding = encoding.map(lambda part, chosen=chosen: torch.tensordot(chosen, part.to(chosen), dims=1))
        latents = subject.latents[images]
        noisy = schedule.add_noise(latents, noise, timesteps)
        # On a CPU the backward of the other kernel takes a third of a step in bfloat16.
        kernel = sdpa_kernel(SDPBackend.MATH) if bf16 and device.type == "cpu" else nullcontext()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16), kernel:
            prediction = family.predict(family.model, noisy, timesteps, encoding, side)
        target = prediction_target(schedule, latents, noise, timesteps)
        loss = masked_loss(prediction, target, subject.masks[images], snr_weights(schedule, timesteps, SNR_GAMMA))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        if not norm.isfinite() or norm == 0:
            raise RuntimeError(f"the gradients of step {index + 1} are {'zero' if norm == 0 else 'not finite'}")
        optimizer.param_groups[0]["lr"] = learning_rate * lr_factor(index + 1)
        optimizer.step()
        optimizer.zero_grad()
        if (step := index + 1) in (save_at or (steps,)):
            saved[step] = Path(output_dir) / f"step-{step}"
            saved[step].mkdir(parents=True, exist_ok=True)
            save(saved[step])
    return saved


class NewToken:
    """A placeholder token whose embedding is trained, from the embedding of the super-class's last token.

    The scripts train the whole table and put its other rows back after each step; this trains the one row.
    """

    def __init__(self, pipeline, placeholder_token, superclass):
        self.placeholder_token, self.text_encoder = placeholder_token, pipeline.text_encoder
        (start,) = superclass_embeddings(family_of(pipeline), superclass)
        if len(pipeline.tokenizer.tokenize(placeholder_token)) == 1:
            raise ValueError(f"the tokenizer knows {placeholder_token!r} already")
        pipeline.tokenizer.add_tokens(placeholder_token)
        self.token_id = pipeline.tokenizer.convert_tokens_to_ids(placeholder_token)
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
        pipeline.text_encoder.requires_grad_(False)  # the table is another now
        self.embedding = nn.Parameter(start)
        self._hook = pipeline.text_encoder.get_input_embeddings().register_forward_hook(self._put)

    def _put(self, module, args, output):
        return torch.where((args[0] == self.token_id).unsqueeze(-1), self.embedding, output)

    def save(self, folder):
        save_file(
            {self.placeholder_token: self.embedding.detach().half()[None]},
            folder / EMBEDDING_FILE,
            metadata={"format": "pt"},
        )

    @torch.no_grad()
    def settle(self):
        """Write the embedding into the table and remove the hook."""
        self._hook.remove()
        embedding_table(self.text_encoder)[self.token_id] = self.embedding


def textual_inversion(pipeline, subject, placeholder_token, superclass, *, phrase=None, **how):
    """Train one token embedding; `how` is of `train`, which says what is returned too."""
    freeze(pipeline)
    new = NewToken(pipeline, placeholder_token, superclass)
    saved = train(pipeline, subject, phrase or placeholder_token, [new.embedding], new.save, **how)
    new.settle()
    return saved


def load_textual_inversion(pipeline, *folders):
    """Load one token embedding, or several side by side."""
    pipeline.load_textual_inversion([str(folder) for folder in folders])


def lora(pipeline, subject, placeholder_token, superclass, *, rank, changes=None, phrase=None, seed=0, **how):
    """Train low-rank changes of projections of the model, by default of those that the scripts train.

    `changes` says which, as peft's `target_modules`; `how` is of `train`.
    """
    freeze(pipeline)
    model = edited_model(pipeline)
    changes = changes or (FLUX_PROJECTIONS if isinstance(pipeline, FluxPipeline) else PROJECTIONS)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)

    def save(folder):
        layers = {name: tensor.half() for name, tensor in get_peft_model_state_dict(model).items()}
        if isinstance(pipeline, FluxPipeline):
            pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        elif hasattr(pipeline, "save_lora_weights"):
            pipeline.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(layers))
        else:  # diffusers loads no LoRA into PixArt
            save_file(layers, folder / LORA_FILE, metadata={"rank": str(rank), "changes": json.dumps(changes)})

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return train(pipeline, subject, phrase or superclass, parameters, save, seed=seed, max_norm=MAX_NORM, **how)


def load_lora(pipeline, *folders):
    """Load one, or add several up."""
    if not hasattr(pipeline, "load_lora_weights"):
        return inject_lora(pipeline.transformer, *folders)
    names = [f"concept_{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=name)
    pipeline.set_adapters(names, [1.0] * len(names))


def inject_lora(model, folder):
    """Load one into a model by peft alone."""
    with safe_open(folder / LORA_FILE, "pt") as file:
        rank, changes = (json.loads(file.metadata()[name]) for name in ("rank", "changes"))
        layers = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=changes), model)
    set_peft_model_state_dict(model, layers)


def scale_lora(pipeline, scale):
    """Set how much all loaded LoRAs count."""
    for module in edited_model(pipeline).modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.set_scale(name, scale)


def custom_diffusion(pipeline, subject, placeholder_token, superclass, *, phrase=None, **how):
    """Train keys and values of cross-attention and the token before the super-class; `how` is of `train`."""
    freeze(pipeline)
    new = NewToken(pipeline, placeholder_token, superclass)
    unet = pipeline.unet
    cross = cross_attention_layers(unet)
    processors = {}
    for name in unet.attn_processors:
        layer = cross.get(name.removesuffix(".processor"))
        if layer is None:  # self-attention's own do what they did, but a file is read only with one for every layer
            processors[name] = CustomDiffusionAttnProcessor2_0(train_kv=False, train_q_out=False)
            continue
        processors[name] = processor = CustomDiffusionAttnProcessor2_0(
            train_q_out=False, hidden_size=layer.inner_kv_dim, cross_attention_dim=layer.cross_attention_dim
        )
        processor.to_k_custom_diffusion.load_state_dict(layer.to_k.state_dict())
        processor.to_v_custom_diffusion.load_state_dict(layer.to_v.state_dict())
    unet.set_attn_processor(processors)  # which empties the dictionary
    unet.eval()

    def save(folder):
        # Not as safetensors: that leaves out the empty entries of self-attention, and what is left cannot be loaded.
        unet.save_attn_procs(folder, weight_name=KV_FILE, save_function=_save_half, safe_serialization=False)
        new.save(folder)

    learning = (processor.parameters() for processor in unet.attn_processors.values())
    parameters = [new.embedding, *itertools.chain.from_iterable(learning)]
    phrase = phrase or f"{placeholder_token} {superclass}"
    saved = train(pipeline, subject, phrase, parameters, save, max_norm=MAX_NORM, **how)
    new.settle()
    return saved


def _save_half(weights, path):
    torch.save({name: value.half() if torch.is_tensor(value) else value for name, value in weights.items()}, path)


def load_custom_diffusion(pipeline, folder):
    """Load one; keys and values of two exclude each other."""
    # Without `_pipeline`, diffusers 0.42 reads the file and then does nothing with it.
    pipeline.unet.load_attn_procs(str(folder), weight_name=KV_FILE, _pipeline=pipeline)
    load_textual_inversion(pipeline, folder)


def bytes_of(folder):
    """Return the bytes of a saved method."""
    return sum(path.stat().st_size for path in Path(folder).iterdir())


@dataclass(frozen=True)
class Method:
    """A method that Perfusion is compared with.

    Attributes:
        train: a function of the pipeline, subject, placeholder token, super-class and settings, to `{step: folder}`.
        load: a function of a fresh pipeline and a folder; or of several folders, if it takes several concepts.
        several: whether it takes several.
        calls: what names the subject in a prompt, of `placeholder_token` and `superclass`.
    """

    train: Callable
    load: Callable
    several: bool
    calls: str

    def phrase(self, placeholder_token, superclass):
        """Return what to put in the gap of a prompt."""
        return self.calls.format(placeholder_token=placeholder_token, superclass=superclass)


METHODS = {
    "textual_inversion": Method(textual_inversion, load_textual_inversion, True, "{placeholder_token}"),
    "lora": Method(lora, load_lora, True, "{superclass}"),
    "custom_diffusion": Method(custom_diffusion, load_custom_diffusion, False, "{placeholder_token} {superclass}"),
}
