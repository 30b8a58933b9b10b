"""`sweep`: one concept at several biases and temperatures, and which of them is best."""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import save as serialize
from tqdm.auto import tqdm

from ..concept import HEADER_KEY, ConceptHeader, PerfusionConcept, check_bias, check_temperature, write_atomically
from ..families import edited_model
from ..loaders import add_perfusion
from ..pictures import slug
from ..state import Locking
from .judge import Judge, Scores, mean_scores
from .metrics import Mean, bootstrap_mean, superclass_prompt
from .sheets import draw_sheet

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.get_logger(__name__)

SWEEP_NAME = "sweep.json"
SETTINGS_NAME = "settings.json"

_CONCEPT = "sweep"  # what the concept is called on the pipeline

# Places, companions, worn things, a colour and a style; `{}` is the concept's word.
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


@dataclass(frozen=True)
class SweepRow:
    """The scores at one pair of settings.

    Attributes:
        bias: `β`.
        temperature: `τ`.
        identity: mean similarity to the subject's pictures, with its 95 % interval over the prompts.
        text: mean alignment with the prompt, likewise.
    """

    bias: float
    temperature: float
    identity: Mean
    text: Mean

    @property
    def harmonic_mean(self) -> float:
        """Of the two means, see `Scores.harmonic_mean`."""
        return Scores(self.identity.mean, self.text.mean).harmonic_mean


@dataclass(frozen=True)
class Sweep:
    """What `sweep` found.

    Attributes:
        settings: how the pictures were drawn and by which models judged; plain JSON.
        rows: one for each temperature and bias, in ascending order.
        pictures: file, settings, prompt, seed and both scores of each picture; plain JSON.
    """

    settings: dict[str, Any]
    rows: list[SweepRow]
    pictures: list[dict[str, Any]]

    @property
    def best(self) -> SweepRow | None:
        """The row with the best harmonic mean, the first of equals; None if no row has both scores above 0."""
        best = max(self.rows, key=lambda row: row.harmonic_mean)
        return best if best.harmonic_mean > 0 else None

    def table(self) -> list[dict[str, Any]]:
        """The rows for a reader, such as that of a model card: scores as text, rounded, with their intervals."""
        return [
            {
                "β": row.bias,
                "τ": row.temperature,
                "identity": _shown(row.identity),
                "text alignment": _shown(row.text),
                "harmonic mean": f"{row.harmonic_mean:.3f}",
            }
            for row in self.rows
        ]

    def check_concept(self, concept: PerfusionConcept) -> None:
        """Raise ValueError unless the pictures were drawn with this concept, whatever its default settings are."""
        if self.settings.get("concept_sha256") != fingerprint(concept):
            raise ValueError(
                f"the sweep is of another concept than this {concept.placeholder_token}, or of an earlier fit of it; "
                "sweep this one into another output_dir"
            )

    def write_default(self, path: str | os.PathLike) -> None:
        """Make the best bias and temperature those that a concept file is drawn with unless others are set.

        Args:
            path: the file; it is rewritten whole or not at all, and nothing else in it changes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is of another concept, or no settings are best, for no row has both scores above 0.
        """
        concept = PerfusionConcept.load(path)
        self.check_concept(concept)
        best = self.best
        if best is None:
            raise ValueError(f"no settings have both scores above 0, so none became the default in {path}")
        concept = replace(concept, bias=best.bias, temperature=best.temperature)
        concept.save(path, dtype=ConceptHeader.read(path).dtype)

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything as JSON, whole or not at all, and return the path."""
        rows = [
            {
                "bias": row.bias,
                "temperature": row.temperature,
                "identity": row.identity._asdict(),
                "text": row.text._asdict(),
                "harmonic_mean": row.harmonic_mean,
            }
            for row in self.rows
        ]
        best = self.best and {"bias": self.best.bias, "temperature": self.best.temperature}
        data = {"settings": self.settings, "best": best, "rows": rows, "pictures": self.pictures}
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
            if not isinstance(data["settings"], dict) or not isinstance(data["pictures"], list) or not data["rows"]:
                raise ValueError("its settings, rows or pictures are missing")
            rows = [
                SweepRow(
                    check_bias(row["bias"]),
                    check_temperature(row["temperature"]),
                    *(Mean(*(_cosine(row[score][part]) for part in Mean._fields)) for score in Scores._fields),
                )
                for row in data["rows"]
            ]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{path} is not a sweep's {SWEEP_NAME} ({error!s:.200})") from error
        return cls(data["settings"], rows, data["pictures"])


class _Task(NamedTuple):
    """One picture to draw."""

    bias: float
    temperature: float
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        """Its path in the output folder, which does not depend on what else is drawn."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        folder = f"pictures/bias-{self.bias}-temperature-{self.temperature}"
        return f"{folder}/{slug(self.prompt)[:40]}-{digest}-seed-{self.seed}.png"


def sweep(
    pipeline: Any,
    concept: PerfusionConcept,
    judge: Judge,
    prompts: Sequence[str] | None = None,
    *,
    output_dir: str | os.PathLike,
    biases: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1),
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    locking: Locking = "local",
    batch_size: int = 4,
    accelerator: "Accelerator | None" = None,
) -> Sweep:
    """Draw a concept at every bias and temperature, score the pictures, and write down which settings are best.

    Best is the highest harmonic mean of mean identity and mean text alignment, by which the paper chooses checkpoints
    (Appendix A).

    The output folder gets `sweep.json`, which is the returned `Sweep`, the plot `front.png`, the sheet `grid.png` of
    the first seed's pictures, and each picture in `pictures`. Pictures that are there are not drawn again: the same
    call goes on where a stopped one was, and one with more biases, temperatures, prompts or seeds draws what is new.
    Several processes share the work, and need the output folder on a disk they share.

    Args:
        pipeline: of the base model, without concepts; it stays on its device and in its precision.
        concept: what is drawn.
        judge: scores the pictures, on the main process; it is given prompts with the super-category for the word.
        prompts: each with the concept's word; by default `PROMPTS`.
        output_dir: folder for all that is written.
        biases: `β`; by default the concept's `bias_range` in steps of about 0.1.
        temperatures: `τ`; by default the concept's own.
        seeds: of the noise; a picture of each prompt is drawn from each of them, whatever else is in its batch.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance, the paper's 6.
        locking: how keys are locked, as in `set_perfusion`.
        batch_size: pictures that a process draws at once.
        accelerator: its processes share the work; by default those that accelerate has launched.

    Raises:
        ValueError: if a setting is out of range, a prompt is without the concept's word, the pipeline has concepts
            loaded, or the output folder holds pictures that were drawn in another way; before any is drawn.
        KeyboardInterrupt: passed on, after a line that says how to go on.
    """
    from accelerate import Accelerator

    # Now, so that a missing matplotlib is not found out when all is drawn.
    from .plots import plot_front

    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    word = concept.placeholder_token
    prompts = [prompt.format(word) for prompt in PROMPTS] if prompts is None else list(dict.fromkeys(prompts))
    biases = _steps(*concept.bias_range) if biases is None else biases
    biases = sorted({check_bias(bias) for bias in biases})
    temperatures = [concept.temperature] if temperatures is None else temperatures
    temperatures = sorted({check_temperature(temperature) for temperature in temperatures})
    seeds = list(dict.fromkeys(seeds))
    for name, values in {"prompts": prompts, "biases": biases, "temperatures": temperatures, "seeds": seeds}.items():
        if not values:
            raise ValueError(f"{name} is empty; expected at least one")
    for name, value in {"num_inference_steps": num_inference_steps, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    for prompt in prompts:
        if word not in prompt:
            raise ValueError(f"the prompt {prompt!r} does not hold the concept's word {word}")
    if add_perfusion(pipeline).list_perfusion():
        raise ValueError("the pipeline has concepts loaded; call unload_perfusion() before a sweep")

    folder = Path(output_dir)
    denoising = {"num_inference_steps": num_inference_steps, "guidance_scale": float(guidance_scale)}
    drawn_with = {
        "base_model": _name(pipeline),
        "concept_sha256": fingerprint(concept),
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(edited_model(pipeline).dtype).removeprefix("torch."),
        "locking": locking,
        **denoising,
    }
    _check_settings(folder / SETTINGS_NAME, drawn_with)
    groups = [
        [_Task(bias, temperature, prompt, seed) for prompt in prompts for seed in seeds]
        for temperature in temperatures
        for bias in biases
    ]
    pipeline.load_perfusion(concept, concept_name=_CONCEPT)
    try:
        pipeline.set_perfusion(locking=locking)
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / SETTINGS_NAME, drawn_with)
        batches = _missing(folder, groups, batch_size)
        # Every process has to see the same pictures missing, before one of them draws any.
        accelerator.wait_for_everyone()
        share = batches[accelerator.process_index :: accelerator.num_processes]
        with tqdm(total=sum(map(len, share)), desc="Pictures", disable=not accelerator.is_main_process) as bar:
            for batch in share:
                _draw(pipeline, folder, batch, **denoising)
                bar.update(len(batch))
    except KeyboardInterrupt:
        logger.warning(f"The sweep was stopped. The same call goes on with the pictures that are in {folder}.")
        raise
    finally:
        pipeline.unload_perfusion()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        rows, pictures = _score(folder, groups, judge, {concept.placeholder_token: concept.superclass})
        models = {"clip_model": _name(judge.clip.model), "identity_model": _name(judge.identity.model)}
        swept = Sweep(drawn_with | models, rows, pictures)
        write_atomically(folder / "front.png", plot_front(swept))
        write_atomically(folder / "grid.png", _png(_grid(folder, groups, swept.best)))
        swept.save(folder / SWEEP_NAME)
    accelerator.wait_for_everyone()
    return Sweep.read(folder / SWEEP_NAME)


def fingerprint(concept: PerfusionConcept) -> str:
    """The sha256 of what a concept draws, in hexadecimal: its words and numbers, and not its default settings."""
    tensors = concept.state_dict()  # in the precision of a file, so that a concept and its file are the same
    del tensors[HEADER_KEY]
    digest = hashlib.sha256(f"{concept.placeholder_token}\n{concept.superclass}\n".encode())
    digest.update(serialize(tensors))
    return digest.hexdigest()


def _steps(low: float, high: float) -> list[float]:
    """Numbers from `low` to `high`, about 0.1 apart."""
    count = max(round((high - low) / 0.1), 1)
    return [round(low + (high - low) * n / count, 3) for n in range(count + 1)]


def _missing(folder: Path, groups: Sequence[Sequence[_Task]], batch_size: int) -> list[list[_Task]]:
    """The pictures that are not there, in batches of one bias and temperature each."""
    left = [[task for task in group if not (folder / task.file).is_file()] for group in groups]
    return [group[start : start + batch_size] for group in left for start in range(0, len(group), batch_size)]


def _draw(pipeline: Any, folder: Path, batch: Sequence[_Task], **options: Any) -> None:
    """Draw one batch, and write each picture whole or not at all."""
    pipeline.set_perfusion(bias=batch[0].bias, temperature=batch[0].temperature)
    images = pipeline(
        [task.prompt for task in batch],
        **options,
        # On the CPU, so that every device starts from the same noise.
        generator=[torch.Generator().manual_seed(task.seed) for task in batch],
    ).images
    for task, image in zip(batch, images, strict=True):
        path = folder / task.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _png(image))


def _score(
    folder: Path, groups: Sequence[Sequence[_Task]], judge: Judge, superclasses: Mapping[str, str]
) -> tuple[list[SweepRow], list[dict[str, Any]]]:
    """A row for each group of pictures, and what `Sweep.pictures` holds."""
    rows, pictures = [], []
    for group in tqdm(groups, desc="Scores"):
        images = [_read_picture(folder / task.file) for task in group]
        scores = judge.score(images, [superclass_prompt(task.prompt, superclasses) for task in group])
        by_prompt: dict[str, list[Scores]] = {}
        for task, score in zip(group, scores, strict=True):
            by_prompt.setdefault(task.prompt, []).append(score)
            pictures.append({"file": task.file, **task._asdict(), **score._asdict()})
        # Pictures of one prompt are alike, so that only prompts are independent of each other.
        means = [mean_scores(held) for held in by_prompt.values()]
        identity, text = (bootstrap_mean(values) for values in zip(*means, strict=True))
        rows.append(SweepRow(group[0].bias, group[0].temperature, identity, text))
    return rows, pictures


def _grid(folder: Path, groups: Sequence[Sequence[_Task]], best: SweepRow | None) -> Image.Image:
    """The first seed's pictures: a row a bias and temperature, a column a prompt."""
    rows = []
    for group in groups:
        bias, temperature, _, seed = group[0]
        label = f"bias {bias}\ntemperature {temperature}"
        if best and (bias, temperature) == (best.bias, best.temperature):
            label += "\nbest"
        rows.append((label, [_read_picture(folder / task.file) for task in group if task.seed == seed]))
    captions = [task.prompt for task in groups[0] if task.seed == groups[0][0].seed]
    return draw_sheet(rows, captions, label_width=120)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if the pictures beside a settings file were drawn in another way."""
    if not path.exists():
        return
    held = _read_json(path)
    if not isinstance(held, dict):
        raise ValueError(f"{path} does not hold the settings of a sweep; choose another output_dir")
    for name, value in settings.items():
        if held.get(name) != value:
            raise ValueError(
                f"the pictures in {path.parent} were drawn with {name} {held.get(name)}, and this sweep has {value}; "
                "give the same again, or choose another output_dir"
            )


def _name(model: Any) -> str:
    """Id on the Hub of a model or pipeline, or the last part of its folder."""
    name = str(model.name_or_path or "")
    return Path(name).resolve().name if Path(name).is_dir() else name


def _shown(mean: Mean) -> str:
    return f"{mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})"


def _cosine(value: Any) -> float:
    """A score from a file; rounding may have taken one past 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1.01 <= value <= 1.01:
        raise ValueError(f"a score is {value!r:.80}; expected a number from -1 to 1")
    return float(value)


def _read_picture(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error!s:.200})") from error


def _write_json(path: Path, data: Any) -> None:
    write_atomically(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
