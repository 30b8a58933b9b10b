"""`Selection`: scores the concept at some steps of a fit, and remembers it as it was at the best of them."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..concept import write_atomically
from ..evaluation import ClipEncoder, IdentityEncoder, Judge, Scores, mean_scores, superclass_prompt
from .config import FitConfig
from .learner import NAME, Learner
from .validation import draw

_BEST = "selection.best."
_NAMES = {"identity": "identity", "text": "text alignment", "harmonic_mean": "harmonic mean"}


class Selection:
    """The scores of a fit so far, and the learner at the best of them (paper Section 4 and Appendix A).

    `state_dict` has all of it, for a checkpoint: a fit that goes on chooses as one that was not stopped. What is
    written into the output folder, `selection.json` and `selection.png`, is for people.

    Args:
        config: what to choose by, prompts, number of pictures, judges and output folder.
        references: the pictures that the concept is fitted to.
        device: where the judges run.

    Attributes:
        scores: means over all pictures, by step.
        best: the learner's state at the chosen step.

    Raises:
        ValueError: if a judge cannot be loaded.
        RuntimeError: if matplotlib is not installed.
    """

    def __init__(self, config: FitConfig, references: Sequence[Image.Image], device: torch.device):
        _figure_class()  # at once, and not after the first steps
        self.config = config
        self.judge = make_judge(config, references, device)
        self.scores: dict[int, Scores] = {}
        self.best: dict[str, Tensor] = {}

    @property
    def chosen(self) -> int:
        """The step with the best score so far, of equals the first."""
        return max(self.scores, key=self._score_of)

    def _score_of(self, step: int) -> float:
        return getattr(self.scores[step], str(self.config.select_by))

    @property
    def outcome(self) -> str:
        """What was chosen, as a sentence."""
        scores = ", ".join(f"{name} {getattr(self.scores[self.chosen], key):.4f}" for key, name in _NAMES.items())
        return f"Step {self.chosen} is kept, the best of {', '.join(map(str, self.scores))}: {scores}."

    def score(self, learner: Learner, step: int) -> None:
        """Draw the prompts with the concept as it would be if the fit ended here, and score the pictures.

        Args:
            learner: the concept; its accelerator's trackers get the scores.
            step: optimizer steps done.
        """
        config = self.config
        rows = draw(
            learner.pipeline,
            NAME,
            config.selection_prompt,
            config.num_selection_images,
            config.seed,
            learner.accelerator,
        )
        read = [superclass_prompt(p, {config.placeholder_token: config.superclass}) for p in config.selection_prompt]
        pairs = [(picture, prompt) for prompt, row in zip(read, rows, strict=True) for picture in row]
        self.scores[step] = mean_scores(self.judge.score(*zip(*pairs, strict=True)))
        if self.chosen == step:
            # On a CPU the state is the parameters themselves, which the next step changes.
            self.best = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
        learner.accelerator.log({f"selection/{key}": getattr(self.scores[step], key) for key in _NAMES}, step=step)
        self._write()

    def _write(self) -> None:
        folder = Path(self.config.output_dir)
        record = {
            "select_by": self.config.select_by,
            "chosen_step": self.chosen,
            "scores": [
                {"step": step} | {key: getattr(scores, key) for key in _NAMES} for step, scores in self.scores.items()
            ],
        }
        write_atomically(folder / "selection.json", f"{json.dumps(record, indent=2)}\n".encode())
        png = io.BytesIO()
        plot(self.scores, self.chosen).savefig(png, format="png", dpi=150)
        write_atomically(folder / "selection.png", png.getvalue())

    def state_dict(self) -> dict[str, Tensor]:
        """Scores and best state, under names that no learner's state has."""
        return {
            "selection.steps": torch.tensor(list(self.scores), dtype=torch.int64),
            "selection.scores": torch.tensor([*self.scores.values()], dtype=torch.float64).reshape(-1, 2),
        } | {_BEST + name: tensor for name, tensor in self.best.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave, whatever else is in it, and write the files of that moment."""
        steps, scores = state["selection.steps"].tolist(), state["selection.scores"].tolist()
        self.scores = {step: Scores(*pair) for step, pair in zip(steps, scores, strict=True)}
        self.best = {name.removeprefix(_BEST): tensor for name, tensor in state.items() if name.startswith(_BEST)}
        if self.scores:
            self._write()


def make_judge(config: FitConfig, references: Sequence[Image.Image], device: torch.device) -> Judge:
    """The judge that a config asks for.

    Raises:
        ValueError: if a model cannot be loaded, or gives no embeddings of the kind that it is for.
    """

    def load(setting: str, kind: type[ClipEncoder] | type[IdentityEncoder], expected: str) -> Any:
        source = getattr(config, setting)
        try:
            encoder = kind.from_pretrained(source, device)
            encoder.encode_pictures(references[:1])  # some models of another kind load, and fail only then
        except Exception as error:  # of any type, depending on what the folder holds
            reason = str(error).partition("\n")[0].rstrip(" .:")
            raise ValueError(
                f"{setting} {source!r} cannot be used ({reason}); expected the id or folder of a {expected}"
            ) from error
        return encoder

    clip = load("clip_model", ClipEncoder, "CLIP")
    if config.identity_model == config.clip_model:
        return Judge(clip, clip, references)
    return Judge(clip, load("identity_model", IdentityEncoder, "DINO-style vision transformer"), references)


def plot(scores: Mapping[int, Scores], chosen: int) -> Any:
    """Each score over the steps, and where the chosen step is.

    Args:
        scores: by step.
        chosen: one of the steps.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = _figure_class()(figsize=(6, 6), layout="constrained")
    panels = figure.subplots(len(_NAMES), sharex=True)
    # Each has its own scale: next to identity, text alignment hardly moves.
    for axes, (key, name) in zip(panels, _NAMES.items(), strict=True):
        axes.plot(list(scores), [getattr(entry, key) for entry in scores.values()], marker="o")
        axes.axvline(chosen, color="black", linestyle=":")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_title(f"step {chosen} is kept")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    return figure


def _figure_class() -> Any:
    """`matplotlib.figure.Figure`, which only those need who choose a step."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "select_by plots its scores with matplotlib, which is missing; install diffusers_perfusion[train]"
        ) from error
    return Figure
