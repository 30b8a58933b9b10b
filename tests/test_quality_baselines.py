"""The baselines that the quality benchmark measures Perfusion against."""

import copy

import baselines
import compare
import pytest
import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from variants import PANELS

from diffusers_perfusion.model_families import cross_attention_layers
from diffusers_perfusion.training.images import to_tensor

TOKEN, SUPERCLASS = "<my-cat>", "cat"
SETTINGS = {"textual_inversion": {}, "lora": {"rank": 2}, "custom_diffusion": {}}


@pytest.fixture
def fresh(components):
    """Another pipeline of the same base model each time."""

    def make():
        pipeline = StableDiffusionPipeline(**copy.deepcopy(components))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def subject(fresh, images_folder):
    (images_folder / "masks").mkdir()
    for path in images_folder.glob("*.png"):
        with Image.open(path) as image:
            Image.linear_gradient("L").resize(image.size).save(images_folder / "masks" / path.name)
    return baselines.read_subject(fresh(), images_folder, 16)


@pytest.fixture
def train(subject, tmp_path):
    """Train a method for two steps at a rate at which they can be seen."""

    def run(name, pipeline, folder="training", placeholder_token=TOKEN, **settings):
        settings = {"learning_rate": 0.1, "steps": 2, "batch_size": 4, "output_dir": tmp_path / folder} | settings
        return baselines.METHODS[name].train(
            pipeline, subject, placeholder_token, SUPERCLASS, **SETTINGS[name], **settings
        )

    return run


def tensors(pipeline):
    return {
        f"{part}.{name}": value.clone()
        for part in ("vae", "text_encoder", "unet")
        for name, value in getattr(pipeline, part).state_dict().items()
    }


def test_the_subject_is_what_a_training_reads(subject, fresh, images_folder):
    assert subject.latents.shape == (6, 4, 8, 8) and subject.masks.shape == (6, 1, 8, 8)
    assert subject.masks.eq(1).all()
    masked = baselines.read_subject(fresh(), images_folder, 16, masked=True)
    assert torch.equal(masked.latents, subject.latents)
    assert masked.masks[0, 0, -1, 0] == 1 > masked.masks[0, 0, 0, 0]  # the gradient is kept


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_only_what_the_method_adds_is_trained(name, bf16, train, fresh):
    pipeline = fresh()
    before = tensors(pipeline)
    train(name, pipeline, bf16=bf16)
    # LoRA moves the projections into another module, beside its own weights.
    after = {key.replace(".base_layer", ""): value for key, value in tensors(pipeline).items()}
    table = next(key for key in before if key.endswith("token_embedding.weight"))
    added = {key: after.pop(key) for key in set(after) - set(before)}
    rows = after[table]
    after[table] = rows[: len(before[table])]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)

    tokens = [] if name == "lora" else [TOKEN]
    assert len(rows) - len(before[table]) == len(tokens)
    if tokens:
        row = rows[pipeline.tokenizer.convert_tokens_to_ids(TOKEN)]
        start = before[table][pipeline.tokenizer(SUPERCLASS, add_special_tokens=False).input_ids[-1]]
        assert 0 < (row - start).abs().max() < 0.5
    layers = cross_attention_layers(pipeline.unet)
    if name == "textual_inversion":
        assert not added
    elif name == "lora":
        # Four projections of each layer of self- and of cross-attention, two matrices each.
        assert len(added) == 2 * len(layers) * 4 * 2
        assert all(value.any() for value in added.values())
    else:
        assert len(added) == len(layers) * 2
        for key, value in added.items():
            layer, which = key.split(".processor.")
            original = before[f"{layer}.{which.replace('_custom_diffusion', '')}"]
            assert value.shape == original.shape and not torch.equal(value, original)


def test_a_lora_is_trained_where_it_is_told_to(train, fresh):
    (changes,) = (
        variant.options["changes"]
        for variant in PANELS["ablations"]
        if variant.name.endswith("keys and values from text")
    )
    pipeline = fresh()
    train("lora", pipeline, changes=changes)
    changed = {name.split(".lora_")[0] for name in pipeline.unet.state_dict() if ".lora_" in name}
    assert changed == {f"{layer}.{to}" for layer in cross_attention_layers(pipeline.unet) for to in ("to_k", "to_v")}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loaded_file_generates_what_was_trained(name, train, fresh, generate):
    method = baselines.METHODS[name]
    trained, loaded = fresh(), fresh()
    saved = train(name, trained, save_at=[1, 2])
    assert list(saved) == [1, 2] and {folder.name for folder in saved.values()} == {"step-1", "step-2"}
    method.load(loaded, saved[2])
    prompt = f"a photo of a {method.phrase(TOKEN, SUPERCLASS)} on the beach"
    expected = generate(prompt, trained)
    rounded = (generate(prompt, loaded) - expected).abs().max()  # by the file, which is in float16
    assert rounded < 5e-3
    plain = fresh()
    if name != "lora":  # the token as it started
        plain.tokenizer.add_tokens(TOKEN)
        plain.text_encoder.resize_token_embeddings(len(plain.tokenizer), mean_resizing=False)
        table = plain.text_encoder.get_input_embeddings().weight.data
        table[-1] = table[plain.tokenizer(SUPERCLASS, add_special_tokens=False).input_ids[-1]]
    assert (generate(prompt, plain) - expected).abs().max() > 10 * rounded
    earlier = fresh()
    method.load(earlier, saved[1])
    assert (generate(prompt, earlier) - expected).abs().max() > 5 * rounded


@pytest.mark.parametrize(
    ("lr_scheduler", "expected"),
    [("constant_with_warmup", [0.02, 0.04, 0.06, 0.08, 0.1, 0.1]), ("linear", [0.02, 0.04, 0.06, 0.08, 0.1, 0.05])],
)
def test_the_learning_rate_is_that_of_a_training(train, fresh, monkeypatch, lr_scheduler, expected):
    rates, step = [], torch.optim.AdamW.step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train("lora", fresh(), steps=6, lr_scheduler=lr_scheduler)
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_seed_decides_the_file(name, train, fresh):
    def content(folder, seed):
        (saved,) = train(name, fresh(), folder, seed=seed).values()
        return {path.name: path.read_bytes() for path in sorted(saved.iterdir())}

    torch.manual_seed(1)
    first = content("first", 3)
    torch.manual_seed(2)
    assert content("again", 3) == first
    assert content("other", 4) != first


@pytest.mark.parametrize("name", SETTINGS)
def test_files_are_of_the_trained_tensors_in_float16(name, train, fresh):
    pipeline = fresh()
    (folder,) = train(name, pipeline).values()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert baselines.bytes_of(folder) == sum(sizes.values())
    for path in folder.glob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    numbers = {
        "textual_inversion": [],
        "lora": [p for key, p in pipeline.unet.named_parameters() if ".lora_" in key],
        "custom_diffusion": [p for key, p in pipeline.unet.named_parameters() if "custom_diffusion" in key],
    }[name]
    expected = 2 * sum(p.numel() for p in numbers)
    expected += 0 if name == "lora" else 2 * pipeline.text_encoder.config.hidden_size
    # Names and headers, which are most of a tiny model's files, come on top.
    assert expected < baselines.bytes_of(folder) < expected + 800 * (len(numbers) + 1) + 1000


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "custom_diffusion"])
def test_two_concepts_are_loaded_together(name, train, fresh, generate):
    method = baselines.METHODS[name]
    assert method.several
    tokens = [TOKEN, "<my-dog>"]
    folders = [
        next(iter(train(name, fresh(), f"training-{seed}", token, seed=seed).values()))
        for seed, token in enumerate(tokens)
    ]
    both = fresh()
    method.load(both, *folders)
    prompt = "a photo of " + " and ".join(method.phrase(token, SUPERCLASS) for token in tokens)
    combined = generate(prompt, both)
    for folder in folders:
        one = fresh()
        method.load(one, folder)
        assert (generate(prompt, one) - combined).abs().max() > 1e-3
    if name == "textual_inversion":
        for folder, token in zip(folders, tokens, strict=True):
            row = both.text_encoder.get_input_embeddings().weight[both.tokenizer.convert_tokens_to_ids(token)]
            (saved,) = load_file(folder / baselines.EMBEDDING_FILE).values()
            assert torch.equal(row.half(), saved[0])


def test_low_precision_gives_the_same_gradients(train, fresh):
    # The first step of Adam is little more than the sign of the gradient.
    embeddings = {}
    for bf16 in (False, True):
        pipeline = fresh()
        train("textual_inversion", pipeline, f"bf16-{bf16}", steps=1, bf16=bf16)
        embeddings[bf16] = pipeline.text_encoder.get_input_embeddings().weight[-1]
    assert torch.isclose(embeddings[True], embeddings[False], atol=1e-4).float().mean() > 0.9


def test_a_known_token_or_gradients_that_are_zero_are_refused(train, fresh):
    with pytest.raises(ValueError, match="knows 'cat' already"):
        train("textual_inversion", fresh(), placeholder_token="cat")
    pipeline = fresh()
    with pytest.raises(RuntimeError, match="gradients of step 1 are zero"):
        train("textual_inversion", pipeline, placeholder_token="<a-token>", phrase="dog")


@pytest.mark.parametrize("base", [PixArtSigmaPipeline, FluxPipeline])
def test_a_lora_of_a_transformer_is_trained_loaded_and_scaled(base, request, images_folder, tmp_path):
    components = request.getfixturevalue({PixArtSigmaPipeline: "pixart", FluxPipeline: "flux"}[base] + "_components")

    def make():
        pipeline = base(**copy.deepcopy(components))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generate(pipeline):
        (image,) = compare.generate(pipeline, ["a cat on the beach"], [0], 2, side=16)
        return to_tensor([image])

    pipeline, method = make(), baselines.METHODS["lora"]
    subject = baselines.read_subject(pipeline, images_folder, 16)
    settings = {"learning_rate": 0.1, "steps": 2, "batch_size": 4, "output_dir": tmp_path, "rank": 2}
    saved = method.train(pipeline, subject, TOKEN, SUPERCLASS, **settings)
    loaded, plain = make(), generate(make())
    method.load(loaded, saved[2])
    images = {}
    for scale in (1.0, 0.5, 0.0):
        baselines.scale_lora(loaded, scale)
        images[scale] = generate(loaded)
    torch.testing.assert_close(images[1.0], generate(pipeline), atol=0.02, rtol=0)  # saved in half precision
    torch.testing.assert_close(images[0.0], plain)
    assert (images[1.0] - plain).abs().max() > (images[0.5] - plain).abs().max() > 1e-3
