"""Train a base model and its text encoders together, on the cached latents and their captions.

    python examples/pocket/recipe/train_base.py --data_dir data --tokenizer pocket/tokenizer --output_dir training

Saves the moving averages of all as `unet` (or `transformer`), `text_encoder` and so on, and `state.pt`, from which the
same command goes on when it was stopped.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from bases import BASES
from files import finished
from optimiser import Optimiser
from tqdm import trange

HELD_OUT = 512  # the last scenes, for the validation loss
NO_CAPTION = 0.1  # the share of captions left out, for classifier-free guidance
SAVE_EVERY = 250


def constant_then_linear(progress):
    """A constant rate that falls to nothing over the last fifth."""
    return min(1, 5 * (1 - progress))


def mean_errors(base, models, latents, tokens, timesteps, noise):
    """Mean squared error of each image, `(batch,)`."""
    noisy = base.objective.noisy(latents, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = base.predict(*models, noisy, timesteps, tokens)
    target = base.objective.target(latents, noise, timesteps)
    return (predicted.float() - target).square().mean((1, 2, 3))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # its batches have another size
def validate(base, models, latents, tokens):
    """The plain loss on held-out scenes, always with the same timesteps and noise."""
    generator = torch.Generator().manual_seed(5)
    errors = []
    for z, ids in zip(latents.split(128), tokens.split(128), strict=True):
        timesteps = base.objective.timesteps(len(z), generator)
        noise = torch.randn(z.shape, generator=generator)
        errors.append(mean_errors(base, models, z.float(), ids, timesteps, noise))
    return torch.cat(errors).mean().item()


class MovingAverage:
    """The moving average of models' parameters, which is slow only once there is something to average."""

    def __init__(self, *models):
        self.source = [parameter for model in models for parameter in model.parameters()]
        self.values = [parameter.detach().clone() for parameter in self.source]
        self.steps = 0

    @torch.no_grad()
    def update(self):
        """Take in the parameters as they are."""
        self.steps += 1
        torch._foreach_lerp_(self.values, self.source, 1 - min(0.999, (1 + self.steps) / (10 + self.steps)))

    @torch.no_grad()
    def swap(self):
        """Exchange the parameters and the average."""
        for parameter, value in zip(self.source, self.values, strict=True):
            held = parameter.clone()
            parameter.copy_(value)
            value.copy_(held)


def main(args=None):
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What encode_latents.py wrote to.")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--base", choices=BASES, default="pocket", help="Its shape.")
    parser.add_argument("--steps", type=int, default=9300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="Compile the models, which takes minutes at first.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    torch.manual_seed(arguments.seed)
    base = BASES[arguments.base]
    tokenizers = base.tokenizers(arguments.tokenizer)
    latents = torch.from_numpy(np.load(arguments.data_dir / "latents.npy"))
    captions = (arguments.data_dir / "captions.txt").read_text().splitlines()
    ids = [
        torch.tensor(tokenizer(["", *captions], padding="max_length", truncation=True).input_ids)
        for tokenizer in tokenizers.values()
    ]
    empty, tokens = torch.cat(ids, 1).split([1, len(captions)])
    held_out = min(HELD_OUT, len(latents) // 10)

    parts = {base.component: base.new_model(), **base.new_text_encoders(**tokenizers)}
    models = list(parts.values())
    if arguments.compile:
        for model in models:
            model.compile()
    optimiser = Optimiser(
        *models, steps=arguments.steps, lr=6e-4, muon_lr=2e-3, warmup=200, decay=constant_then_linear
    )
    average = MovingAverage(*models)

    def save():
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"average": average.values, "optimiser": optimiser.state_dict(), "step": average.steps}
        with finished(state_file) as path:
            torch.save(state, path)
        average.swap()
        loss = validate(base, models, latents[-held_out:], tokens[-held_out:])
        for name, part in parts.items():
            with finished(arguments.output_dir / name) as folder:
                part.save_pretrained(folder)
        average.swap()
        progress.write(f"step {average.steps}: validation loss {loss:.5f}")

    state_file = arguments.output_dir / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        average.values, average.steps = state["average"], state["step"]
        optimiser.load_state_dict(state["optimiser"])
        torch.manual_seed(arguments.seed + average.steps)  # other scenes than before it was stopped

    progress = trange(average.steps, arguments.steps, mininterval=10)
    for _ in progress:
        rows = torch.randint(len(latents) - held_out, (arguments.batch,))
        z = latents[rows].float().contiguous(memory_format=torch.channels_last)
        ids = torch.where(torch.rand(arguments.batch, 1) < NO_CAPTION, empty, tokens[rows])
        timesteps = base.objective.timesteps(arguments.batch)
        errors = mean_errors(base, models, z, ids, timesteps, torch.randn_like(z))
        loss = (errors * base.objective.weights(timesteps)).mean()
        optimiser.step(loss)
        average.update()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if average.steps % SAVE_EVERY == 0:
            save()
    if average.steps % SAVE_EVERY:
        save()


if __name__ == "__main__":
    main()
