"""`sweep`: scores of a concept at several checkpoints, biases and temperatures, and the best of them."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import save as serialize
from tqdm.auto import tqdm

from ..concept import PerfusionConcept
from ..concept_file import HEADER_KEY, ConceptHeader, check_bias, check_temperature
from ..files import slug, to_png, write_atomically
from ..image_files import read_image
from ..loaders import add_perfusion
from ..model_families import edited_model, family_of
from ..registry import Locking
from .contact_sheet import make_contact_sheet
from .metrics import ConceptMetrics, Mean, Scores, bootstrap_mean, mean_scores, superclass_prompt

logger = logging.get_logger(__name__)

SWEEP_NAME = "sweep.json"
SETTINGS_NAME = "settings.json"

# Places, companions, worn things, a colour and a style; `{}` is the placeholder token.
PROMPTS = (
    "a {} on the beach",
    "a {} in space",
    "a {} under water",
    "a {} wearing a top hat in the city",
    "a blue {} in the desert",
    "a {} and a cat in the snow",
    "a {} on top of a car in a meadow",
    "a black and white photo of a {} at night",
)

_CONCEPT_NAME = "sweep"  # of the concept on the pipeline
_SHA256 = "concept_sha256"  # name of the setting with the fingerprint of the concept


@dataclass(frozen=True)
class SweepRow:
    """The scores at one combination of settings.

    Attributes:
        bias: `β`.
        temperature: `τ`.
        identity: mean similarity to the training images, with its 95 % interval over the prompts.
        text: mean alignment with the prompt, with its 95 % interval over the prompts.
        checkpoint: name of the training's checkpoint; empty in a sweep over one concept file.
    """

    bias: float
    temperature: float
    identity: Mean
    text: Mean
    checkpoint: str = ""

    @property
    def harmonic_mean(self) -> float:
        """The harmonic mean of the two means, see `Scores.harmonic_mean`."""
        return Scores(self.identity.mean, self.text.mean).harmonic_mean


@dataclass(frozen=True)
class Sweep:
    """The result of `sweep`.

    Attributes:
        settings: how the images were generated, and the models of the metrics; plain JSON.
        rows: one for each checkpoint, temperature and bias, in ascending order.
        images: file, settings, prompt, seed and both scores of each image; plain JSON.
    """

    settings: dict[str, Any]
    rows: list[SweepRow]
    images: list[dict[str, Any]]

    @property
    def best(self) -> SweepRow | None:
        """The row with the best harmonic mean, the first of equals; None if no row has both scores above 0."""
        best = max(self.rows, key=lambda row: row.harmonic_mean)
        return best if best.harmonic_mean > 0 else None

    def table(self) -> list[dict[str, Any]]:
        """Return the rows as a table to print: rounded scores with intervals, and checkpoints if there are any."""
        return [
            ({"checkpoint": row.checkpoint} if row.checkpoint else {})
            | {
                "β": row.bias,
                "τ": row.temperature,
                "identity": _format(row.identity),
                "text alignment": _format(row.text),
                "harmonic mean": f"{row.harmonic_mean:.3f}",
            }
            for row in self.rows
        ]

    def for_concept(self, concept: PerfusionConcept) -> "Sweep":
        """Return the part of the sweep whose images were generated with a concept, whatever its default settings are.

        Raises:
            ValueError: if there are no such images.
        """
        sha256 = fingerprint(concept)
        rows = [row for row in self.rows if self.settings.get(_sha256_name(row.checkpoint)) == sha256]
        if not rows:
            raise ValueError(
                f"the sweep is of another concept than this {concept.placeholder_token}, or of an earlier training of "
                "it; sweep this one into another output_dir"
            )
        images = [image for image in self.images if image.get("checkpoint", "") == rows[0].checkpoint]
        return Sweep(self.settings, rows, images)

    def write_default(self, path: str | os.PathLike) -> None:
        """Make the best bias and temperature the defaults of a concept file, and the best checkpoint its concept.

        Args:
            path: the concept file; of a sweep over checkpoints, the one in the folder with the checkpoints. It is
                rewritten whole or not at all.

        Raises:
            FileNotFoundError: if there is no such file or checkpoint.
            ValueError: if it is of another concept, or no row has both scores above 0.
        """
        best = self.best
        if best is None:
            raise ValueError(f"no settings have both scores above 0, so {path} keeps its defaults")
        path = Path(path)
        source = path.parent / best.checkpoint / path.name
        concept = PerfusionConcept.load(source)
        self.for_concept(concept)
        concept = replace(concept, bias=best.bias, temperature=best.temperature)
        concept.save(path, dtype=getattr(torch, ConceptHeader.read(source).dtype))

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything as JSON, whole or not at all, and return the path."""
        rows = [
            {
                "checkpoint": row.checkpoint,
                "bias": row.bias,
                "temperature": row.temperature,
                "identity": row.identity._asdict(),
                "text": row.text._asdict(),
                "harmonic_mean": row.harmonic_mean,
            }
            for row in self.rows
        ]
        best = self.best and {name: getattr(self.best, name) for name in ("checkpoint", "bias", "temperature")}
        data = {"settings": self.settings, "best": best, "rows": rows, "images": self.images}
        _write_json(Path(path), data)
        return Path(path)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Sweep":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not of a sweep.
        """
        data = _read_json(Path(path))
        try:
            if not isinstance(data["settings"], dict) or not isinstance(data["images"], list) or not data["rows"]:
                raise ValueError("its settings, rows or images are missing")
            rows = [
                SweepRow(
                    bias=check_bias(row["bias"]),
                    temperature=check_temperature(row["temperature"]),
                    checkpoint=_check_name(row["checkpoint"]),
                    **{
                        score: Mean(*(_check_score(row[score][part]) for part in Mean._fields))
                        for score in Scores._fields
                    },
                )
                for row in data["rows"]
            ]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{path} is not a sweep's {SWEEP_NAME} ({error!s:.200})") from error
        return cls(data["settings"], rows, data["images"])


class _Task(NamedTuple):
    """One image to generate."""

    checkpoint: str
    bias: float
    temperature: float
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        """Its path in the output folder, which does not depend on what else is generated."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        folder = Path("images", self.checkpoint, f"bias-{self.bias}-temperature-{self.temperature}")
        return f"{folder.as_posix()}/{slug(self.prompt)[:40]}-{digest}-seed-{self.seed}.png"


def sweep(
    pipeline: Any,
    concept: PerfusionConcept | Mapping[str, PerfusionConcept],
    metrics: ConceptMetrics,
    prompts: Sequence[str] | None = None,
    *,
    output_dir: str | os.PathLike,
    biases: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1),
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    locking: Locking = "local",
    batch_size: int = 4,
    accelerator: Any = None,
) -> Sweep:
    """Generate images with a concept at every checkpoint, bias and temperature, score them, and record the best.

    The best row has the highest harmonic mean of mean identity and mean text alignment, by which the paper chooses
    checkpoints (Appendix A).

    The output folder gets `sweep.json`, which is the returned `Sweep`, the plot `pareto_front.png`,
    `contact_sheet.png` with the first seed's images of the best checkpoint, and each image in `images`. Images that
    exist are not generated again: the same call resumes a stopped one, and a call with more checkpoints, biases,
    temperatures, prompts or seeds generates what is new. Several processes share the work, and need the output folder
    on a disk they share.

    Args:
        pipeline: of the base model, without concepts; it stays on its device and in its precision.
        concept: to generate with; or the concepts of one training by the names of its checkpoints.
        metrics: to score the images, on the main process; prompts have the super-class for the placeholder token.
        prompts: each with the placeholder token; by default `PROMPTS`.
        output_dir: folder for all files.
        biases: `β`; by default the concept's `bias_range` in steps of about 0.1.
        temperatures: `τ`; by default the concept's own.
        seeds: of the noise; each gives an image of each prompt, which does not depend on the rest of its batch.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; by default the paper's 6, or in joint attention the pipeline's.
        locking: how keys are locked, as in `set_perfusion`.
        batch_size: images in a batch, per process.
        accelerator: its processes share the work; by default those that accelerate has launched.

    Raises:
        ValueError: if a setting is out of range, a prompt is without the placeholder token, the concepts have
            different ones, the pipeline has concepts loaded, or the output folder has images that were generated in
            another way; before any is generated.
        KeyboardInterrupt: passed on, after a line that says how to resume.
    """
    # Now, so that a missing matplotlib is an error before the images are generated.
    from .plots import plot_pareto_front

    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    concepts = dict(concept) if isinstance(concept, Mapping) else {"": concept}
    if not concepts:
        raise ValueError("concept has no checkpoints; expected at least one")
    *_, last = concepts.values()
    token, superclass = last.placeholder_token, last.superclass
    if len({(one.placeholder_token, one.superclass) for one in concepts.values()}) > 1:
        raise ValueError("the checkpoints have different placeholder tokens or super-classes; expected one training")
    prompts = [prompt.format(token) for prompt in PROMPTS] if prompts is None else list(dict.fromkeys(prompts))
    biases = _range(*last.bias_range) if biases is None else biases
    biases = sorted({check_bias(bias) for bias in biases})
    temperatures = [last.temperature] if temperatures is None else temperatures
    temperatures = sorted({check_temperature(temperature) for temperature in temperatures})
    seeds = list(dict.fromkeys(seeds))
    for name, values in {"prompts": prompts, "biases": biases, "temperatures": temperatures, "seeds": seeds}.items():
        if not values:
            raise ValueError(f"{name} is empty; expected at least one")
    for name, value in {"num_inference_steps": num_inference_steps, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}; expected a finite number")
    for prompt in prompts:
        if token not in prompt:
            raise ValueError(f"the prompt {prompt!r} does not contain the placeholder token {token}")
    if add_perfusion(pipeline).list_perfusion():
        raise ValueError("the pipeline has concepts loaded; call unload_perfusion() before a sweep")

    folder = Path(output_dir)
    denoising: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    denoising |= family_of(pipeline).call_arguments(guidance_scale)
    settings = {
        "base_model": _name(pipeline),
        **{_sha256_name(checkpoint): fingerprint(one) for checkpoint, one in concepts.items()},
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(edited_model(pipeline).dtype).removeprefix("torch."),
        "locking": locking,
        **denoising,
    }
    earlier = _check_settings(folder / SETTINGS_NAME, settings)
    groups = [
        [_Task(checkpoint, bias, temperature, prompt, seed) for prompt in prompts for seed in seeds]
        for checkpoint in concepts
        for temperature in temperatures
        for bias in biases
    ]
    try:
        loaded = next(iter(concepts))
        _load(pipeline, concepts[loaded], locking)
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / SETTINGS_NAME, earlier | settings)
        batches = _missing(folder, groups, batch_size)
        # All processes must see the same images missing, before one of them generates any.
        accelerator.wait_for_everyone()
        share = batches[accelerator.process_index :: accelerator.num_processes]
        with tqdm(total=sum(map(len, share)), desc="Images", disable=not accelerator.is_main_process) as bar:
            for batch in share:
                if batch[0].checkpoint != loaded:
                    loaded = batch[0].checkpoint
                    _load(pipeline, concepts[loaded], locking)
                _generate(pipeline, folder, batch, **denoising)
                bar.update(len(batch))
    except KeyboardInterrupt:
        logger.warning(f"The sweep was stopped. The same call resumes it with the images that are in {folder}.")
        raise
    finally:
        pipeline.unload_perfusion()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        rows, images = _score(folder, groups, metrics, {token: superclass})
        models = {"clip_model": _name(metrics.clip.model), "identity_model": _name(metrics.identity.model)}
        result = Sweep(settings | models, rows, images)
        write_atomically(folder / "pareto_front.png", plot_pareto_front(*_plot_data(result)))
        write_atomically(folder / "contact_sheet.png", to_png(_contact_sheet(folder, groups, result.best)))
        result.save(folder / SWEEP_NAME)
    accelerator.wait_for_everyone()
    return Sweep.read(folder / SWEEP_NAME)


def fingerprint(concept: PerfusionConcept) -> str:
    """Return the sha256 of a concept's token, super-class and tensors, which its default settings do not change."""
    tensors = concept.state_dict()  # in the precision of a file, so that a concept and its file are the same
    del tensors[HEADER_KEY]
    digest = hashlib.sha256(f"{concept.placeholder_token}\n{concept.superclass}\n".encode())
    digest.update(serialize(tensors))
    return digest.hexdigest()


def _sha256_name(checkpoint: str) -> str:
    """Return the name of the setting with the fingerprint of a checkpoint, or of the only concept."""
    return f"{_SHA256}.{checkpoint}" if checkpoint else _SHA256


def _range(low: float, high: float) -> list[float]:
    """Return numbers from `low` to `high`, about 0.1 apart."""
    count = max(round((high - low) / 0.1), 1)
    return [round(low + (high - low) * n / count, 3) for n in range(count + 1)]


def _missing(folder: Path, groups: Sequence[Sequence[_Task]], batch_size: int) -> list[list[_Task]]:
    """Return the images that do not exist, in batches of one checkpoint, bias and temperature each."""
    missing = [[task for task in group if not (folder / task.file).is_file()] for group in groups]
    return [group[start : start + batch_size] for group in missing for start in range(0, len(group), batch_size)]


def _load(pipeline: Any, concept: PerfusionConcept, locking: Locking) -> None:
    """Load a concept in place of the loaded one."""
    pipeline.unload_perfusion()
    pipeline.load_perfusion(concept, concept_name=_CONCEPT_NAME)
    pipeline.set_perfusion(locking=locking)


def _generate(pipeline: Any, folder: Path, batch: Sequence[_Task], **options: Any) -> None:
    """Generate one batch, and write each image whole or not at all."""
    pipeline.set_perfusion(bias=batch[0].bias, temperature=batch[0].temperature)
    images = pipeline(
        prompt=[task.prompt for task in batch],
        **options,
        # On the CPU, so that every device starts from the same noise.
        generator=[torch.Generator().manual_seed(task.seed) for task in batch],
    ).images
    for task, image in zip(batch, images, strict=True):
        path = folder / task.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_png(image))


def _score(
    folder: Path, groups: Sequence[Sequence[_Task]], metrics: ConceptMetrics, superclasses: Mapping[str, str]
) -> tuple[list[SweepRow], list[dict[str, Any]]]:
    """Return a row for each group of images, and `Sweep.images`."""
    rows, images = [], []
    for group in tqdm(groups, desc="Scores"):
        scores = metrics.score(
            [read_image(folder / task.file) for task in group],
            [superclass_prompt(task.prompt, superclasses) for task in group],
        )
        by_prompt: dict[str, list[Scores]] = {}
        for task, score in zip(group, scores, strict=True):
            by_prompt.setdefault(task.prompt, []).append(score)
            images.append({"file": task.file, **task._asdict(), **score._asdict()})
        # Images of one prompt are alike, so only prompts are independent of each other.
        means = [mean_scores(of_prompt) for of_prompt in by_prompt.values()]
        identity, text = (bootstrap_mean(values) for values in zip(*means, strict=True))
        rows.append(SweepRow(group[0].bias, group[0].temperature, identity, text, group[0].checkpoint))
    return rows, images


def _plot_data(result: Sweep) -> tuple[dict[str, list[Any]], Any]:
    """Return the arguments of `plot_pareto_front`: a line per checkpoint and temperature, and the best point."""
    from .plots import Point

    lines: dict[str, list[Point]] = {}
    for row in result.rows:
        label = ", ".join(part for part in (row.checkpoint, f"τ = {row.temperature}") if part)
        lines.setdefault(label, []).append(Point(f"β {row.bias}", row.text.mean, row.identity.mean))
    best = result.best and Point(
        f"best harmonic mean, {result.best.harmonic_mean:.3f}", result.best.text.mean, result.best.identity.mean
    )
    return lines, best


def _contact_sheet(folder: Path, groups: Sequence[Sequence[_Task]], best: SweepRow | None) -> Image.Image:
    """Arrange the first seed's images of the best checkpoint: a row per bias and temperature, a column per prompt."""
    checkpoint = best.checkpoint if best else groups[-1][0].checkpoint
    rows, captions = [], []
    for group in groups:
        _, bias, temperature, _, seed = group[0]
        if group[0].checkpoint != checkpoint:
            continue
        label = f"bias {bias}\ntemperature {temperature}"
        if best and (bias, temperature) == (best.bias, best.temperature):
            label += "\nbest"
        tasks = [task for task in group if task.seed == seed]
        rows.append((label, [read_image(folder / task.file) for task in tasks]))
        captions = [task.prompt for task in tasks]
    return make_contact_sheet(rows, captions, label_width=120)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a file, or raise ValueError if the images beside it were generated in another way."""
    if not path.exists():
        return {}
    earlier = _read_json(path)
    if not isinstance(earlier, dict):
        raise ValueError(f"{path} does not hold the settings of a sweep; choose another output_dir")
    for name, value in settings.items():
        # A checkpoint that is not among the earlier ones has no images yet.
        if earlier.get(name, value if name.startswith(_SHA256) else None) != value:
            raise ValueError(
                f"the images in {path.parent} were generated with {name} {earlier.get(name)}, and this sweep has "
                f"{value}; give the same again, or choose another output_dir"
            )
    return earlier


def _name(model: Any) -> str:
    """Return the Hub id of a model or pipeline, or the last part of its folder."""
    name = str(model.name_or_path or "")
    return Path(name).resolve().name if Path(name).is_dir() else name


def _format(mean: Mean) -> str:
    return f"{mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})"


def _check_score(value: Any) -> float:
    """Return a score from a file, or raise ValueError if it is no cosine; rounding may have taken one past 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1.01 <= value <= 1.01:
        raise ValueError(f"a score is {value!r:.80}; expected a number from -1 to 1")
    return float(value)


def _check_name(value: Any) -> str:
    """Return the name of a checkpoint from a file, or raise ValueError if it is not one of a folder."""
    if not isinstance(value, str) or len(value) > 80 or not value.isprintable() or Path(value).name != value:
        raise ValueError(f"a checkpoint is {value!r:.80}; expected the name of a folder")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error!s:.200})") from error


def _write_json(path: Path, data: Any) -> None:
    write_atomically(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
