import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LENGTH, WIDTH
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPSegTextConfig,
    CLIPSegVisionConfig,
    CLIPTokenizer,
    ViTImageProcessor,
)

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training.images import read_images, to_tensor
from diffusers_perfusion.training.masks import CLIPSEG, attention_masks, clipseg_masks, subject_masks

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def read(images_folder):
    """The images of the folder as they are now."""
    return lambda: read_images(images_folder, 16, seed=3)


@pytest.fixture
def masks_of(images_folder, read, pipeline):
    """`subject_masks` of the images in the folder."""

    def run(source, superclass="cat", seed=0):
        return subject_masks(source, read(), images_folder, superclass, pipeline, seed)

    return run


def add_alpha(folder):
    """Give every image in a folder an alpha channel: its left half is the subject."""
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as file:
            image = file.convert("RGBA")
        image.putalpha(half(image.size))
        image.save(path)


def half(size):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def write_masks(images_folder, folder, scale=1):
    """Draw masks for all images: their left half."""
    folder.mkdir()
    for path in sorted(images_folder.glob("*.png")):
        with Image.open(path) as file:
            half(tuple(scale * side for side in file.size)).save(folder / path.name)


@pytest.fixture
def clipseg_folder(tmp_path, tokenizer_folder):
    """A tiny CLIPSeg model with random weights."""
    folder = tmp_path / "clipseg"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPSegTextConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **small, **special)
    vision = CLIPSegVisionConfig(image_size=32, patch_size=8, **small)
    config = CLIPSegConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=16,
        extract_layers=[1, 2],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    model = CLIPSegForImageSegmentation(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    CLIPSegProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def put_in_cache(clipseg_folder, home):
    """Put a model into the Hugging Face cache as if it had been downloaded as `CLIPSEG`."""
    repository = home / "hub" / f"models--{CLIPSEG.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(clipseg_folder, repository / "snapshots" / ("0" * 40))


def test_no_masks(masks_of):
    assert masks_of("none") == (None, "none")


def test_alpha_channels(masks_of, images_folder, read):
    add_alpha(images_folder)
    masks, source = masks_of("alpha")
    assert source == "alpha"
    assert torch.equal(masks, to_tensor([image.alpha for image in read()]))
    assert masks.shape == (3, 1, 16, 16)
    assert masks[0, 0, :, :7].min() == 1
    assert masks[0, 0, :, 9:].max() == 0


def test_alpha_channels_must_be_in_every_image(masks_of, images_folder):
    add_alpha(images_folder)
    Image.new("RGB", (16, 16)).save(images_folder / "2.png")
    with pytest.raises(ValueError, match=r"2\.png has no alpha channel"):
        masks_of("alpha")
    assert masks_of("auto")[1] != "alpha"


@pytest.mark.parametrize("scale", [1, 3])
def test_a_folder_of_masks_is_cropped_like_the_images(masks_of, images_folder, tmp_path, scale):
    write_masks(images_folder, tmp_path / "by-hand", scale)
    masks, source = masks_of(str(tmp_path / "by-hand"))
    assert source == "folder"
    assert masks.shape == (3, 1, 16, 16)
    add_alpha(images_folder)
    assert (masks - masks_of("alpha")[0]).abs().mean() < 0.02


def test_a_mask_of_sixteen_bits_stays_soft(masks_of, images_folder, tmp_path):
    write_masks(images_folder, tmp_path / "by-hand")
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "by-hand" / "1.png")
    assert masks_of(str(tmp_path / "by-hand"))[0][0].unique().tolist() == pytest.approx([0.5], abs=0.01)


def test_a_mask_may_be_of_another_file_type(masks_of, images_folder, tmp_path):
    write_masks(images_folder, tmp_path / "by-hand")
    with Image.open(tmp_path / "by-hand" / "2.png") as file:
        file.save(tmp_path / "by-hand" / "2.bmp")
    expected = masks_of(str(tmp_path / "by-hand"))[0]
    (tmp_path / "by-hand" / "2.png").unlink()
    assert torch.equal(masks_of(str(tmp_path / "by-hand"))[0], expected)


def test_a_mask_of_the_image_s_own_name_comes_first(masks_of, images_folder, tmp_path, caplog):
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    expected = masks_of(str(folder))[0]
    Image.new("L", (16, 16), 255).save(folder / "1.jpg")
    (folder / "1.gif").write_text("a foreign file")
    (folder / "2.json").write_text("{}")
    (folder / "3").mkdir()
    (folder / "Thumbs.db").touch()
    assert torch.equal(masks_of(str(folder))[0], expected)
    assert not caplog.records


def test_a_mask_of_another_image_s_name_is_that_image_s(masks_of, images_folder, tmp_path):
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    Image.new("RGB", (16, 16)).save(images_folder / "1.jpg")
    with pytest.raises(ValueError, match=r"by-hand has no mask for 1\.jpg"):
        masks_of(str(folder))


def test_files_that_are_no_masks_are_skipped_with_a_line(masks_of, images_folder, tmp_path, caplog):
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    expected = masks_of(str(folder))[0]
    (folder / "1.png").rename(folder / "1.tiff")
    (folder / "1.json").write_text("{}")
    (folder / "1").mkdir()
    assert torch.equal(masks_of(str(folder))[0], expected)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" ")[0] for line in lines] == [f"{folder}/1", f"{folder}/1.json"]
    (folder / "1.tiff").write_text("")
    with pytest.raises(ValueError, match=r"by-hand has no mask for 1\.png; expected an image of the same name"):
        masks_of(str(folder))


def test_a_mask_may_be_a_cut_out(masks_of, images_folder, tmp_path):
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    expected = masks_of(str(folder))[0]
    for path in folder.iterdir():
        with Image.open(path) as mask:
            cut_out = Image.new("RGBA", mask.size, (30, 20, 10, 255))
            cut_out.putalpha(mask.convert("L"))
        cut_out.save(path)
    assert torch.equal(masks_of(str(folder))[0], expected)


def test_an_opaque_mask_with_an_alpha_channel_is_greyscale(masks_of, images_folder, tmp_path):
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    expected = masks_of(str(folder))[0]
    for path in folder.iterdir():
        with Image.open(path) as mask:
            mask.convert("RGBA").save(path)
    assert torch.equal(masks_of(str(folder))[0], expected)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_a_mask_of_long_integers_is_not_black(masks_of, images_folder, tmp_path, white):
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    expected = masks_of(str(folder))[0]
    for path in folder.iterdir():
        with Image.open(path) as mask:
            values = (np.asarray(mask) // 255).astype(np.uint16) * white
        Image.fromarray(values).save(path)
    assert torch.equal(masks_of(str(folder))[0], expected)


def test_a_mask_that_is_turned_by_a_quarter_is_refused(masks_of, images_folder, tmp_path):
    """As of a tool that ignores Exif data."""
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    with Image.open(folder / "2.png") as mask:
        turned, square = mask.rotate(90, expand=True), mask.resize((16, 16))
    turned.save(folder / "2.png")
    with pytest.raises(ValueError, match=r"by-hand/2\.png is turned by a quarter from 2\.png; expected it upright"):
        masks_of(str(folder))
    square.save(folder / "2.png")
    masks_of(str(folder))


def test_missing_and_black_masks(masks_of, images_folder, tmp_path):
    folder = tmp_path / "by-hand"
    write_masks(images_folder, folder)
    Image.new("L", (16, 16)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"by-hand/3\.png is black"):
        masks_of(str(folder))
    (folder / "3.png").unlink()
    with pytest.raises(ValueError, match=r"by-hand has no mask for 3\.png"):
        masks_of(str(folder))


@pytest.mark.parametrize("superclass", ["cat", "teddy bear"])
def test_attention_of_the_base_model(masks_of, pipeline, superclass):
    before = dict(pipeline.unet.attn_processors)
    masks, source = masks_of("attention", superclass)
    assert source == "attention"
    assert masks.shape == (3, 1, 8, 8)
    assert torch.isfinite(masks).all()
    assert masks.amin((1, 2, 3)).eq(0).all() and masks.amax((1, 2, 3)).eq(1).all()
    assert not torch.allclose(masks[0], masks[1], atol=0.1)
    assert all(processor is before[name] for name, processor in pipeline.unet.attn_processors.items())
    assert torch.equal(masks_of("attention", superclass)[0], masks)
    assert not torch.equal(masks_of("attention", superclass, seed=1)[0], masks)


def test_attention_is_that_to_every_token_of_the_superclass(masks_of, pipeline):
    _, bear = pipeline.tokenizer("teddy bear", add_special_tokens=False).input_ids
    others, last = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))

    def tell_bears_alone(module, args, output):
        output[0][:] = others
        output[0][args[0] == bear] = last

    pipeline.text_encoder.register_forward_hook(tell_bears_alone)
    # Where "bear" gets more attention each of the other words gets less, and "teddy" is one of those.
    masks = torch.stack([masks_of("attention", words)[0] for words in ("bear", "teddy bear")]).flatten(1)
    assert torch.corrcoef(masks)[0, 1] > 0.95


def test_processors_are_restored_when_the_unet_fails(pipeline, read):
    before = dict(pipeline.unet.attn_processors)
    latents = family_of(pipeline).encode_latents(pipeline.vae, to_tensor([image.image for image in read()]))
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    pipeline.unet.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_masks(pipeline, DDPMScheduler.from_config(pipeline.scheduler.config), latents, "cat")
    assert all(processor is before[name] for name, processor in pipeline.unet.attn_processors.items())


def test_clipseg(masks_of, clipseg_folder, read):
    masks, source = masks_of(str(clipseg_folder))
    assert source == "clipseg"
    assert masks.shape == (3, 1, 32, 32)
    assert (masks > 0).all() and (masks < 1).all() and masks.std() > 0.01
    assert not torch.allclose(masks, masks_of(str(clipseg_folder), "dog on the beach")[0], atol=0.1)
    one = clipseg_masks(read()[1:2], "cat", str(clipseg_folder))
    torch.testing.assert_close(one, masks[1:2])


def test_auto_takes_the_first_source_there_is(masks_of, images_folder, clipseg_folder, hugging_face_home, tmp_path):
    masks, source = masks_of("auto")
    assert source == "attention"
    assert torch.equal(masks, masks_of("attention")[0])

    put_in_cache(clipseg_folder, hugging_face_home)
    masks, source = masks_of("auto")
    assert source == "clipseg"
    assert torch.equal(masks, masks_of(str(clipseg_folder))[0])

    for path in hugging_face_home.rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert masks_of("auto")[1] == "attention"

    write_masks(images_folder, images_folder / "masks")
    masks, source = masks_of("auto")
    assert source == "folder"
    assert torch.equal(masks, masks_of(str(images_folder / "masks"))[0])

    add_alpha(images_folder)
    assert masks_of("auto")[1] == "alpha"


@pytest.mark.parametrize("source", ["auto", "attention", "none"])
def test_a_folder_named_like_a_source_is_not_taken_for_it(masks_of, tmp_path, monkeypatch, source):
    (tmp_path / "here" / source).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert masks_of(source)[1] == ("attention" if source == "auto" else source)


def test_a_source_that_is_not_there(masks_of, tmp_path):
    with pytest.raises(ValueError, match=r"mask is '.*no-masks'; expected a folder of masks, or a CLIPSeg model"):
        masks_of(str(tmp_path / "no-masks"))


def test_a_damaged_clipseg_model_is_named(masks_of, clipseg_folder):
    weights = clipseg_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"mask is '{clipseg_folder}'; expected .* that can be loaded \("):
        masks_of(str(clipseg_folder))


@pytest.fixture(scope="module")
def pocket():
    return StableDiffusionPipeline.from_pretrained(EXAMPLES / "pocket", torch_dtype=torch.float32)


def test_attention_of_the_pocket_model_finds_the_subjects(pocket):
    for concept in ("chair", "mug", "robot", "teddy_bear"):
        folder = EXAMPLES / "data" / concept
        images = read_images(folder, 64)
        masks, _ = subject_masks("attention", images, folder, concept.replace("_", " "), pocket)
        exact, _ = subject_masks("auto", images, folder, concept, pocket)
        found = torch.stack([masks, F.interpolate(exact, masks.shape[-2:], mode="area")]).flatten(1)
        assert masks.shape == (5, 1, 16, 16)
        assert torch.corrcoef(found)[0, 1] > 0.8, concept
