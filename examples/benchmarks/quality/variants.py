"""Variants of the comparison: Perfusion, baselines over a grid of settings, and Perfusion with one part changed."""

import math
import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations import (
    first_images,
    no_fading,
    trained_keys,
)
from baselines import METHODS, bytes_of, read_subject, scale_lora
from subjects import ABLATED, TEST, TUNING
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.training import TrainingConfig
from diffusers_perfusion.training import train as train_perfusion

BIASES = (0.7, 0.85, 1.0, 1.2)
SCALES = (0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Base:
    """The base model and the super-class alone."""

    name: str = "base"

    def changes(self):
        """Return a context that changes nothing."""
        return nullcontext()

    def train(self, pipeline, base, subject, folder):
        """Return the base model as its one point."""
        return {0: None}

    def load(self, pipeline, subject, file):
        """Yield one point, without settings."""
        yield None, {}

    def phrase(self, subject):
        """Return what names the subject in a prompt."""
        return subject.superclass

    def bytes(self, file):
        """Return the bytes of what was trained."""
        return 0


@dataclass(frozen=True)
class Baseline:
    """Another method; its points are steps, or for a LoRA at the last step scales.

    Attributes:
        name: of the variant.
        method: key of `baselines.METHODS`.
        rate: learning rate.
        save_at: steps after which it is generated with.
        scales: of a LoRA when generating.
        options: of the method's own, such as the rank of a LoRA.
        masked: whether its loss sees the subject only, as Perfusion's.
    """

    name: str
    method: str
    rate: float
    save_at: tuple[int, ...]
    scales: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    masked: bool = False

    changes = Base.changes

    def train(self, pipeline, base, subject, folder):
        """Train in bfloat16."""
        return METHODS[self.method].train(
            pipeline,
            read_subject(pipeline, subject.folder, subject.side, masked=self.masked),
            subject.placeholder_token,
            subject.superclass,
            learning_rate=self.rate,
            steps=max(self.save_at),
            save_at=self.save_at,
            output_dir=folder,
            bf16=True,
            **self.options,
        )

    def load(self, pipeline, subject, file):
        """Yield a point for each scale."""
        METHODS[self.method].load(pipeline, file)
        for scale in self.scales or (None,):
            if scale is not None:
                scale_lora(pipeline, scale)
            yield scale, {}

    def phrase(self, subject):
        """Return what names the subject in a prompt."""
        return METHODS[self.method].phrase(subject.placeholder_token, subject.superclass)

    def bytes(self, file):
        """Return the bytes of what was trained."""
        return bytes_of(file)


@dataclass(frozen=True)
class Perfusion:
    """Perfusion with some settings of its own; its points are biases.

    Attributes:
        name: of the variant.
        settings: of the training, where they are not the defaults.
        save_at: steps after which it is generated with; after the last if empty.
        biases: when generating.
        temperature: when generating; by default the concept's.
        locking: when generating.
        images: how many it is trained on; by default all.
        patches: functions that give a context in which something of the package is changed.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    save_at: tuple[int, ...] = ()
    biases: tuple[float, ...] = (1.0, 1.3)
    temperature: float | None = None
    locking: str = "local"
    images: int | None = None
    patches: tuple[Any, ...] = ()

    def changes(self):
        """Return a context with all patches."""
        stack = ExitStack()
        for patch in self.patches:
            stack.enter_context(patch())
        return stack

    def train(self, pipeline, base, subject, folder):
        """Train in bfloat16."""
        shutil.rmtree(folder / "training", ignore_errors=True)
        images = first_images(subject.folder, folder, self.images) if self.images else subject.folder
        config = TrainingConfig(
            pretrained_model_name_or_path=base,
            instance_data_dir=str(images),
            placeholder_token=subject.placeholder_token,
            superclass=subject.superclass,
            resolution=subject.side,
            output_dir=str(folder / "training"),
            mixed_precision="bf16",
            **{"checkpointing_steps": 50, **self.settings},
        )
        with sdpa_kernel(SDPBackend.MATH):  # as the baselines
            train_perfusion(add_perfusion(pipeline), config)
        last = {config.max_train_steps: folder / "training" / "perfusion.safetensors"}
        return {
            step: folder / "training" / f"checkpoint-{step}" / "perfusion.safetensors" for step in self.save_at
        } or last

    def load(self, pipeline, subject, file):
        """Yield a point for each bias."""
        add_perfusion(pipeline).load_perfusion(file, "subject")
        for bias in self.biases:
            pipeline.set_perfusion("subject", bias=bias, temperature=self.temperature, locking=self.locking)
            yield bias, {}

    def phrase(self, subject):
        """Return what names the subject in a prompt."""
        return subject.placeholder_token

    def bytes(self, file):
        """Return the bytes of what was trained."""
        return Path(file).stat().st_size


STEPS = (50, 150, 250)


def grid(method, rates, masked=False, save_at=STEPS, **options):
    """Return a method at each of some learning rates, after each of some steps."""
    name = f"{method}{options.get('rank', '')}" + ("-masked" if masked else "")
    return [Baseline(f"{name}-{rate:g}", method, rate, save_at, options=options, masked=masked) for rate in rates]


def perfusion_grid(rates, save_at=STEPS, biases=(1.0, 1.3)):
    """Return Perfusion at pairs of learning rates, of the target outputs and of the token embedding."""
    return [
        Perfusion(
            f"perfusion-{value:g}-{embedding:g}",
            {
                "value_learning_rate": value,
                "embedding_learning_rate": embedding,
                "max_train_steps": max(save_at),
                "checkpointing_steps": math.gcd(*save_at),
            },
            save_at=save_at,
            biases=biases,
        )
        for value, embedding in rates
    ]


PERFUSION = Perfusion("perfusion", biases=BIASES)
LORA = Baseline("lora4", "lora", 1e-3, (250,), scales=SCALES, options={"rank": 4})


def changed(name, *patches, locking="local", images=None, **settings):
    """Return Perfusion with something changed, at two biases."""
    return Perfusion(name, settings, (), (0.7, 1.0), None, locking, images, patches)


def lora_on(name, rate, changes):
    """Return the LoRA of rank 4 on some projections only."""
    return replace(LORA, name=name, rate=rate, options={"rank": 4, "changes": changes})


def short_perfusion(steps, rate):
    """Return Perfusion with fewer steps and this learning rate of the token embedding."""
    return Perfusion(
        f"perfusion-{rate:g}-{steps}", {"max_train_steps": steps, "embedding_learning_rate": rate}, biases=(0.7, 1.0)
    )


def short_lora(steps, rate):
    """Return a LoRA of rank 4; its rate falls to zero at the last step."""
    options = {"rank": 4, "lr_scheduler": "cosine"}
    return Baseline(f"lora4-{rate:g}-cosine-{steps}", "lora", rate, (steps,), scales=(0.6, 1.0), options=options)


# The things of each panel.
ICONS = {
    "tuning": TUNING,
    "ablations": ABLATED,
    "main": TEST,
    "short": TEST,
    "transfer": TEST,
    "flux-tuning": TUNING,
    "flux": TEST,
}
OF_OTHER_BASES = ("transfer", "flux-tuning", "flux")

# That of the transfer is for base models that nothing was chosen on, and those of FLUX for `examples/pocket-flux`.
PANELS = {
    "tuning": [
        Base(),
        *grid("lora", (3e-4, 1e-3), rank=4),
        *grid("custom_diffusion", (1e-4, 3e-4)),
        *grid("lora", (3e-4, 1e-3), rank=16),
        *grid("textual_inversion", (1e-3, 3e-3, 1e-2)),
        *grid("lora", (3e-3,), rank=4),
        *grid("lora", (3e-4, 1e-3), rank=4, masked=True),
        *perfusion_grid([(0.01, 0.0), (0.01, 0.0006), (0.02, 0.002), (0.03, 0.003), (0.03, 0.006)]),
    ],
    "ablations": [
        PERFUSION,
        changed("no fading", no_fading),
        changed("trained keys", trained_keys),
        changed("global keys", locking="global"),
        changed("no mask", mask="none"),
        changed("attention masks", mask="attention"),
        changed("one image", images=1),
        changed("fixed embedding", embedding_learning_rate=0.0),
        LORA,
        lora_on("lora4, keys and values from text", 3e-3, r".*attn2\.to_[kv]"),
    ],
    "main": [
        Base(),
        PERFUSION,
        LORA,
        Baseline("textual inversion", "textual_inversion", 1e-3, (150,)),
        Baseline("custom diffusion", "custom_diffusion", 3e-4, (250,)),
        Baseline("lora16", "lora", 1e-3, (250,), scales=(0.4, 0.8), options={"rank": 16}),
    ],
    "short": [
        PERFUSION,
        *(short_perfusion(*setting) for setting in ((25, 0.02), (50, 0.006), (50, 0.012))),
        LORA,
        *(short_lora(steps, 3e-3) for steps in (25, 50, 100)),
    ],
    "transfer": [Base(), PERFUSION, LORA],
    "flux-tuning": [
        Base(),
        *grid("lora", (1e-3, 3e-3), rank=4, save_at=(100, 250)),
        *grid("lora", (1e-3, 3e-3), rank=16, save_at=(100, 250)),
        *perfusion_grid(
            [(0.03, 0.006), (0.03, 0.02), (0.03, 0.06), (0.1, 0.02), (0.1, 0.06)],
            save_at=(100, 200),
            biases=(0.7, 1.0),
        ),
    ],
    "flux": [
        Base(),
        PERFUSION,
        changed("values alone", embedding_learning_rate=0.0),
        replace(LORA, rate=3e-3),
        Baseline("lora16", "lora", 1e-3, (250,), scales=(0.4, 0.8), options={"rank": 16}),
    ],
}
