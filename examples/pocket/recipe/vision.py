"""What the two evaluators share: the shape of their transformers, and how images come to them."""

import torch

SIDE, PATCH = 64, 8


def transformer(width, layers):
    """Settings of a transformer."""
    return {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "hidden_act": "gelu",
    }


def prepare(model):
    """Make a new model quick to train on a CPU.

    The projection of the patches stays a random rotation: trained it is no better (MoCo v3, Chen et al. 2021, arXiv
    2104.02057), and its gradient is slow. Over short sequences the backward of the fused attention is slow, too.
    """
    for name, parameter in model.named_parameters():
        if "patch_embedding" in name:
            parameter.requires_grad_(False)
            if parameter.ndim > 1:
                torch.nn.init.orthogonal_(parameter, gain=0.1)  # or positions drown in it
    model.set_attn_implementation("eager")
    return model


def image_processor_settings():
    """Settings of an image processor that does to an image what `augment` does, but for chance."""
    return {"size": {"shortest_edge": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def augment(images):
    """Images as bytes, `(batch, side, side, 3)`, to `(batch, 3, side, side)` about [-1, 1], half of them mirrored.

    Contrast and brightness vary a little, for a model's images are paler or darker than the scenes.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
    x = torch.where(mirrored, x.flip(-1), x)
    return x * (0.9 + 0.2 * torch.rand(len(x), 1, 1, 1)) + 0.1 * (torch.rand(len(x), 1, 1, 1) - 0.5)
