"""The stages of examples/pocket/recipe, cut short, from sprites to a pipeline and evaluators."""

import json
import random
import sys
from types import SimpleNamespace

import bases
import encode_latents
import evaluator_scenes
import export
import icons
import numpy as np
import objectives
import optimiser
import pytest
import rasterise
import scenes
import torch
import train_base
import train_clip
import train_identity
import train_tokenizer
import train_vae
import world
from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from diffusers_perfusion.evaluation import ClipEncoder, IdentityEncoder

CAPTIONS = 48


@pytest.fixture(scope="module")
def sprites():
    return icons.load_sprites(scenes.HERE / "sprites.npz")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder in which every stage has run, with few scenes and few steps."""
    folder = tmp_path_factory.mktemp("pocket")
    data, tokenizer, vae, trained = (str(folder / name) for name in ("data", "tokenizer", "vae", "trained"))
    scenes.main(["--count", str(CAPTIONS), "--output_dir", data])
    train_tokenizer.main(["--data_dir", data, "--output_dir", tokenizer])
    train_vae.main(["--data_dir", data, "--steps", "2", "--batch", "2", "--output_dir", vae])
    encode_latents.main(["--data_dir", data, "--vae", vae])
    unet = ["--data_dir", data, "--tokenizer", tokenizer, "--batch", "2", "--output_dir", trained]
    train_base.main([*unet, "--steps", "2"])
    parts = ["--tokenizer", tokenizer, "--vae", vae, "--trained", trained]
    export.main([*parts, "--output_dir", str(folder / "model")])
    some = ["--pairs", "4", "--renditions", "1", "--views", "2"]
    evaluator_scenes.main(["--vae", vae, *some, "--output_dir", data])
    clip = ["--data_dir", data, "--tokenizer", tokenizer, "--steps", "2", "--pairs", "2"]
    train_clip.main([*clip, "--output_dir", str(folder / "clip")])
    identity = ["--data_dir", data, "--steps", "2", "--batch", "4"]
    train_identity.main([*identity, "--output_dir", str(folder / "identity")])
    return SimpleNamespace(folder=folder, data=folder / "data", vae=vae, unet=unet)


def test_the_exported_folder_is_a_pipeline(built):
    pipeline = StableDiffusionPipeline.from_pretrained(built.folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a cat on the beach", num_inference_steps=2, output_type="pt").images
    assert image.shape == (3, 64, 64) and image.isfinite().all()
    for part, dtype in (("unet", torch.float16), ("vae", torch.float16), ("text_encoder", torch.float32)):
        (file,) = (built.folder / "model" / part).glob("*.safetensors")
        assert {value.dtype for value in load_file(file).values() if value.is_floating_point()} == {dtype}


def test_the_evaluators_load_like_any_other(built):
    images = [Image.new("RGB", (80, 64), colour) for colour in ("red", "blue")]
    clip = ClipEncoder.from_pretrained(str(built.folder / "clip"))
    assert clip.encode_images(images).shape == clip.encode_texts(["a cat", "a dog"]).shape
    assert IdentityEncoder.from_pretrained(str(built.folder / "identity")).encode_images(images).isfinite().all()


def test_an_evaluator_sees_images_as_it_did_in_training(built, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    processor = ClipEncoder.from_pretrained(str(built.folder / "clip")).image_processor
    seen = processor(images=Image.fromarray(pixels), return_tensors="pt").pixel_values
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, 0.5))  # no mirror, contrast 1, brightness 0
    torch.testing.assert_close(seen, train_clip.augment(pixels[None]))


def test_latents_are_those_of_the_scenes(built):
    images, latents = (np.load(built.data / f"{name}.npy") for name in ("scenes", "latents"))
    captions = (built.data / "captions.txt").read_text().splitlines()
    assert images.shape == (CAPTIONS, 64, 64, 3) and len(captions) == CAPTIONS
    assert latents.shape == (CAPTIONS, 4, 16, 16) and latents.astype(np.float32).std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("base", "kind", "of_tokenizer"),
    [
        ("unet-77", StableDiffusionPipeline, ["--length", "77"]),
        ("pixart", PixArtSigmaPipeline, ["--format", "t5"]),
    ],
)
def test_bases_of_other_shapes_are_pipelines_too(built, tmp_path, base, kind, of_tokenizer):
    data, tokenizer, trained, model = (str(path) for path in (built.data, *(tmp_path / n for n in "abc")))
    train_tokenizer.main(["--data_dir", data, "--output_dir", tokenizer, *of_tokenizer])
    common = ["--base", base, "--tokenizer", tokenizer]
    train_base.main([*common, "--data_dir", data, "--batch", "2", "--steps", "1", "--output_dir", trained])
    export.main([*common, "--vae", built.vae, "--trained", trained, "--output_dir", model])
    pipeline = kind.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.tokenizer.model_max_length == (77 if base == "unet-77" else 32)
    arguments = {} if base == "unet-77" else {"use_resolution_binning": False, "clean_caption": False}
    images = [
        pipeline(
            prompt,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
            **arguments,
        ).images
        for prompt in ("a cat on the beach", "a blue dog")
    ]
    assert images[0].shape == (1, 3, 64, 64) and images[0].isfinite().all()


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """The folder in which every stage of pocket-flux has run, with few scenes and few steps."""
    folder = tmp_path_factory.mktemp("pocket-flux")
    data, tokenizer, vae, trained = (str(folder / name) for name in ("data", "tokenizer", "vae", "trained"))
    sprites = ["--sprites", str(scenes.HERE / "sprites-160.npz")]
    scenes.main([*sprites, "--side", "128", "--count", "24", "--output_dir", data])
    train_tokenizer.main(["--data_dir", data, "--format", "t5", "--output_dir", tokenizer])
    train_vae.main(["--data_dir", data, "--factor", "8", "--steps", "5", "--batch", "2", "--output_dir", vae])
    encode_latents.main(["--data_dir", data, "--vae", vae])
    common = ["--base", "flux", "--tokenizer", tokenizer]
    train_base.main([*common, "--data_dir", data, "--batch", "2", "--steps", "3", "--output_dir", trained])
    export.main([*common, "--vae", vae, "--trained", trained, "--output_dir", str(folder / "model")])
    return folder


def test_the_exported_flux_folder_is_a_pipeline_with_guidance(flux):
    pipeline = FluxPipeline.from_pretrained(flux / "model")
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompt, **arguments):
        generator = torch.Generator().manual_seed(0)
        settings = {"height": 128, "width": 128, "max_sequence_length": 32, "num_inference_steps": 2}
        return pipeline(prompt, generator=generator, output_type="pt", **settings, **arguments).images

    cat, dog = generate("a cat on the beach"), generate("a blue dog")
    assert cat.shape == (1, 3, 128, 128) and cat.isfinite().all()
    assert not torch.equal(cat, dog)
    assert not torch.equal(cat, generate("a cat on the beach", negative_prompt="", true_cfg_scale=4.0))
    assert pipeline.vae_scale_factor == 8 and pipeline.vae.config.latent_channels == 16
    assert sum(file.stat().st_size for file in (flux / "model").rglob("*")) <= 60e6


def test_a_flux_base_is_trained_as_its_pipeline_samples(flux):
    """With the prediction of a pipeline's own step, whose scheduler gives the timesteps."""
    pipeline = FluxPipeline.from_pretrained(flux / "model")
    base, prompt = train_base.BASES["flux"], "a cat on the beach"
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = FluxPipeline._pack_latents(noise, 1, 16, 16, 16)
    settings = {"height": 128, "width": 128, "max_sequence_length": 32, "num_inference_steps": 1}
    pipeline.set_progress_bar_config(disable=True)
    sampled = pipeline(prompt, latents=packed, output_type="latent", **settings).images
    tokens = torch.cat(
        [
            torch.tensor(tokenizer([prompt], padding="max_length", max_length=32).input_ids)
            for tokenizer in base.tokenizers(flux / "tokenizer").values()
        ],
        1,
    )
    models = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    with torch.no_grad():
        velocity = base.predict(*models, noise, torch.tensor([1000.0]), tokens)
    expected = noise - velocity  # all of the way in one step
    assert velocity.abs().max() > 0
    torch.testing.assert_close(FluxPipeline._unpack_latents(sampled, 128, 128, 8), expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_text_encoder_stays_as_it_is(flux):
    trained, pocket = (
        load_file(folder / "text_encoder" / "model.safetensors") for folder in (flux / "trained", bases.POCKET)
    )
    assert trained.keys() == pocket.keys()
    assert all(torch.equal(trained[name], value) for name, value in pocket.items())


def test_flow_matching_moves_from_the_latents_to_the_noise():
    objective = objectives.FlowMatching()
    latents, noise = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = objective.timesteps(3, torch.Generator().manual_seed(0))
    target = objective.target(latents, noise, timesteps)
    halfway = objective.noisy(latents, noise, timesteps)
    torch.testing.assert_close(objective.noisy(latents, noise, torch.zeros(3)), latents)
    torch.testing.assert_close(objective.noisy(latents, noise, torch.full((3,), 1000.0)), noise)
    torch.testing.assert_close(halfway - timesteps.view(-1, 1, 1, 1) / 1000 * target, latents)
    sigmas = objective.timesteps(20_000, torch.Generator().manual_seed(0)) / 1000
    unshifted = sigmas / (1.5 - 0.5 * sigmas)
    assert sigmas.min() > 0 and sigmas.max() < 1 and unshifted.median() == pytest.approx(0.5, abs=0.01)


def test_the_quick_attention_processor_computes_what_diffusers_does():
    transformer = bases.FluxBase(layers=1, single_layers=1, heads=2).new_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():  # many of which are zero at first
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    image, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 64), (3, 192), (192,)))
    ids = {"img_ids": torch.arange(12.0).view(4, 3), "txt_ids": torch.zeros(3, 3)}
    with torch.no_grad():
        quick = transformer(image, text, pooled, torch.tensor([0.2, 0.9]), **ids).sample
        transformer.set_attn_processor(FluxAttnProcessor())
        expected = transformer(image, text, pooled, torch.tensor([0.2, 0.9]), **ids).sample
    assert not torch.equal(quick, expected)
    torch.testing.assert_close(quick, expected, rtol=1e-4, atol=1e-4)


def test_a_larger_scene_is_the_same_scene(sprites):
    fine = icons.load_sprites(scenes.HERE / "sprites-160.npz")
    for seed in range(40):
        rng = random.Random(seed)
        scene = world.sample_scene(sprites, rng)
        state = rng.getstate()
        small = scene.draw(sprites, rng)
        after = rng.random()
        rng.setstate(state)
        large = scene.draw(fine, rng, 128)
        assert large.size == (128, 128) and rng.random() == after
        shrunk = np.asarray(large.resize((64, 64), Image.Resampling.BOX), float)
        assert np.abs(shrunk - np.asarray(small)).mean() < 10, scene.caption


def test_the_t5_tokenizer_knows_the_worlds_words_and_every_character(built, tmp_path):
    train_tokenizer.main(["--data_dir", str(built.data), "--format", "t5", "--output_dir", str(tmp_path / "t5")])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "t5")
    assert tokenizer.tokenize("A photo of a") == ["\u2581a", "\u2581photo", "\u2581of", "\u2581a"]
    assert tokenizer.unk_token_id not in tokenizer("cute (zebra)!").input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_the_tokenizer_knows_the_worlds_words_and_every_byte(built):
    tokenizer = CLIPTokenizer.from_pretrained(built.folder / "tokenizer")
    assert tokenizer.tokenize("a photo of a") == ["a</w>", "photo</w>", "of</w>", "a</w>"]
    assert tokenizer.decode(tokenizer("zèbre ☂").input_ids, skip_special_tokens=True).strip() == "zèbre ☂"


def test_the_unet_training_is_resumed(built, tmp_path, monkeypatch):
    command = [*built.unet[:-1], str(tmp_path), "--steps", "4"]
    take_step, taken = train_base.Optimiser.step, []

    def step(self, loss):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(loss)
        take_step(self, loss)

    monkeypatch.setattr(train_base, "SAVE_EVERY", 2)
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stopping.setattr(train_base.Optimiser, "step", step)
        train_base.main(command)
    state = torch.load(tmp_path / "state.pt")
    train_base.main(command)
    later = torch.load(tmp_path / "state.pt")
    assert (state["step"], later["step"]) == (2, 4)
    moved = [(state["unet"][name] - later["unet"][name]).abs().max() for name in state["unet"]]
    assert 0 < max(moved) < 0.01  # from the weights it had, and not from new ones


def test_compiled_models_are_saved_like_others(built, tmp_path, monkeypatch):
    compiled, calls = torch.nn.Module.compile, []

    def compile_eagerly(self):
        calls.append(type(self))
        compiled(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    train_base.main([*built.unet[:-1], str(tmp_path), "--steps", "1", "--compile"])
    assert calls == [UNet2DConditionModel, CLIPTextModel]
    state, plain = torch.load(tmp_path / "state.pt"), torch.load(built.folder / "trained" / "state.pt")
    assert state["unet"].keys() == plain["unet"].keys()


def test_the_saved_unet_is_the_moving_average(built):
    state = torch.load(built.folder / "trained" / "state.pt")
    saved = UNet2DConditionModel.from_pretrained(built.folder / "trained" / "unet")
    for (name, value), average in zip(saved.named_parameters(), state["average"], strict=False):
        torch.testing.assert_close(value, average)
        assert name in state["unet"]
    assert not torch.equal(saved.conv_in.weight, state["unet"]["conv_in.weight"])


def test_pairs_of_scenes_differ_in_one_phrase(built, sprites):
    rng = random.Random(0)
    for _ in range(200):
        one, other = evaluator_scenes.clip_pair(sprites, rng)
        assert one.caption != other.caption
        differing = [field for field in vars(one) if getattr(one, field) != getattr(other, field)]
        assert len(differing) == 1
    lines = [json.loads(line) for line in (built.data / "clip.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(line["caption"] not in line["changed"].values() for line in lines)


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_change_is_of_one_kind_alone(kind, sprites):
    rng = random.Random(0)
    for _ in range(100):
        scene = world.give(world.sample_scene(sprites, rng), kind, sprites, rng)
        changed = world.change(scene, kind, sprites, rng)
        assert kind in world.kinds_of(scene) and changed.caption != scene.caption
        assert world.kinds_of(changed) == world.kinds_of(scene)
        if kind == "place":
            assert world.BACKDROPS[changed.place] is not world.BACKDROPS[scene.place]


def test_captions_are_as_frequent_as_the_models_own(sprites):
    """Against the captions that the shipped model was trained on: each phrase within five deviations."""
    known = (scenes.HERE.parent / "captions.txt").read_text().splitlines()
    rng = random.Random(0)
    made = [world.sample_scene(sprites, rng).caption for _ in known]
    phrases = [" on top of", " next to ", " wearing a top hat", "a black and white photo of", "pixel art of", " blue "]
    phrases += ["an image of", " on a pink background", " in the woods", " teddy bear", "an owl", " at night"]
    for phrase in phrases:
        counts = [sum(phrase in caption for caption in captions) for captions in (known, made)]
        assert abs(counts[0] - counts[1]) < 5 * sum(counts) ** 0.5, phrase
    assert len({len(caption.split()) for caption in known} ^ {len(caption.split()) for caption in made}) <= 3


def test_scenes_show_what_their_captions_say(sprites):
    cat = world.Thing("cat", "noto")
    renders = {}
    for name, scene in {
        "cat": world.Scene(cat, "on a white background"),
        "hat": world.Scene(world.replace(cat, worn="top-hat"), "on a white background"),
        "blue": world.Scene(world.replace(cat, colour="blue"), "on a white background"),
        "grey": world.Scene(cat, "on a white background", opening=world.BLACK_AND_WHITE),
        "two": world.Scene(cat, "on a white background", "and", world.Thing("bus", "noto")),
    }.items():
        renders[name] = np.mean([scene.draw(sprites, random.Random(n)) for n in range(20)], axis=0)
    red, blue = (renders["blue"] - renders["cat"])[20:44, 20:44].mean((0, 1))[[0, 2]]
    assert blue > red + 20
    assert np.ptp(renders["grey"], axis=-1).max() == 0
    assert renders["hat"][4:12, 28:36].mean() < renders["cat"][4:12, 28:36].mean() - 20
    assert renders["two"][28:44, 50:58].mean() < renders["cat"][28:44, 50:58].mean() - 20


def test_another_look_is_another_thing(sprites):
    rng = random.Random(0)
    for icon in ("panda", "frog"):  # one without a hue to turn, one with
        thing = world.Thing(icon, "noto")
        other = evaluator_scenes.another_look(sprites, thing, rng)
        a, b = (np.asarray(t.draw(sprites, random.Random(0))[0], float) for t in (thing, other))
        assert np.abs(a - b)[a[..., 3] > 100][:, :3].mean() > evaluator_scenes.DIFFERENT


def test_invented_renditions_are_new_shapes_of_the_same_icon(sprites):
    few = {icon: {"noto": renditions["noto"]} for icon, renditions in sprites.items()}
    more = evaluator_scenes.invent_renditions(few, 2, np.random.default_rng(0))
    assert set(more["cat"]) == {"noto", "noto~0", "noto~1"} and set(more["crown"]) == {"noto"}
    for name in ("noto~0", "noto~1"):
        assert more["cat"][name].shape == more["cat"]["noto"].shape and more["cat"][name].dtype == np.uint8
        assert np.abs(more["cat"][name].astype(int) - more["cat"]["noto"]).mean() > 2


@pytest.mark.parametrize("shape", [(3, 40, 8), (2, 8, 40), (1, 16, 16)])
def test_steps_of_muon_are_nearly_orthogonal(shape):
    made = optimiser.orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(made)
    assert made.shape == shape and singular.min() > 0.4 and singular.max() < 1.4


def test_both_optimisers_go_downhill_and_leave_alone_what_is_frozen():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    model[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    steps = optimiser.Optimiser(model, steps=60, lr=1e-2, muon_lr=1e-1, warmup=5)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        steps.step(loss)
    assert losses[-1] < 0.9 * losses[0]
    unmoved = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert unmoved == ["1.weight"]


def test_the_same_caption_of_another_image_is_not_wrong():
    ids = torch.tensor([[1], [1], [2], [3], [4], [1]])  # of three images, and with a word changed
    logits = torch.tensor([[5.0, 5, 0, 0, 0, 5], [5, 5, 0, 0, 0, 5], [0, 0, 5, 0, 0, 0]])
    assert train_clip.contrastive_loss(logits, ids) < 0.1
    wrong = logits.clone()
    wrong[2, 3] = 6  # its own caption with a word changed
    assert train_clip.contrastive_loss(wrong, ids) > 0.2


def test_icons_become_sprites(tmp_path, monkeypatch):
    """resvg is not needed here: it is replaced by one that draws a box as wide as the SVG's text is long."""

    def svg_to_bytes(svg_string):
        box = Image.new("RGBA", (96, 96))
        ImageDraw.Draw(box).rectangle([10, 20, 10 + len(svg_string) % 40, 60], fill="red")
        with (tmp_path / "box.png").open("wb") as file:
            box.save(file, "png")
        return (tmp_path / "box.png").read_bytes()

    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=svg_to_bytes))
    for rendition in (*icons.BASE_RENDITIONS, icons.CONCEPT_RENDITION):
        (tmp_path / rendition).mkdir()
        names = [*icons.NOUNS, *icons.WORN]
        collection = {
            "icons": {name: {"body": name} for name in names[1:]},
            "aliases": {names[0]: {"parent": names[1]}},
        }
        if rendition == "noto-v1":
            del collection["icons"]["chair"]
        (tmp_path / rendition / "icons.json").write_text(json.dumps(collection))
    rasterise.main(["--icons_dir", str(tmp_path), "--output", str(tmp_path / "sprites.npz")])
    sprites = icons.load_sprites(tmp_path / "sprites.npz")
    assert set(sprites["chair"]) == {"noto", "twemoji", "fluent-emoji-flat"}
    assert np.array_equal(sprites["cat"]["noto"], sprites["dog"]["noto"])  # the alias
    assert sprites["cat"]["noto"].shape == (80, 80, 4)
    assert sprites["cat"]["noto"][40, 40].tolist() == [255, 0, 0, 255]
