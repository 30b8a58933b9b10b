import numpy as np
import pytest
import torch
from conftest import make_vae
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from diffusers_perfusion.pictures import encode_latents, read_pictures, to_tensor


def gradient(width=16, height=16):
    """A picture in which every pixel tells where it is: red to the right, green down."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], -1).astype(np.uint8)


def pixels(picture):
    return np.asarray(picture.image).astype(int)


def test_pictures_come_in_the_order_of_their_names_and_square(tmp_path):
    for name, size in {"b.png": (20, 16), "a.jpg": (16, 30), "c.webp": (40, 40)}.items():
        Image.new("RGB", size, "red").save(tmp_path / name)
    pictures = read_pictures(tmp_path, 16)
    assert [picture.path.name for picture in pictures] == ["a.jpg", "b.png", "c.webp"]
    assert {picture.image.size for picture in pictures} == {(16, 16)}


def test_exif_rotation_is_applied(tmp_path):
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "1.png", exif=exif)
    (picture,) = read_pictures(tmp_path, 16)
    assert np.array_equal(pixels(picture), upright)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16", "LA", "RGBA", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = (np.indices((16, 16)).sum(0) // 8 % 2 * 255).astype(np.uint8)  # black and white patches
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    image.save(tmp_path / ("1.tif" if mode == "CMYK" else "1.png"))
    with Image.open(next(tmp_path.iterdir())) as file:
        assert file.mode == mode
    (picture,) = read_pictures(tmp_path, 16)
    assert picture.image.mode == "RGB"
    assert np.array_equal(pixels(picture), np.stack([grey] * 3, -1))
    assert picture.alpha is None


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "1.png")
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "2.png", transparency=5)
    for picture in read_pictures(tmp_path, 16):
        assert np.array_equal(pixels(picture), np.full((16, 16, 3), 128))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_transparency_becomes_alpha_over_grey(tmp_path, kind):
    image = Image.new("RGBA", (16, 16), (200, 200, 200, 255))
    image.paste((9, 9, 9, 0), (0, 0, 8, 16))
    options = {}
    if kind == "P":
        image, options = Image.new("P", (16, 16), 1), {"transparency": 0}
        image.putpalette([9, 9, 9, 200, 200, 200])
        image.paste(0, (0, 0, 8, 16))
    elif kind == "RGB":
        image, options = image.convert("RGB"), {"transparency": (9, 9, 9)}
    else:
        image = image.convert(kind)
    image.save(tmp_path / "1.png", **options)
    (picture,) = read_pictures(tmp_path, 16)
    assert picture.alpha.mode == "L"
    assert np.array_equal(np.asarray(picture.alpha), np.repeat([[0] * 8 + [255] * 8], 16, 0))
    assert set(pixels(picture)[:, :8].ravel()) == {128}
    assert set(pixels(picture)[:, 8:].ravel()) == {200}


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_a_constant_alpha_channel_counts_as_none(tmp_path, alpha):
    Image.new("RGBA", (16, 16), (10, 20, 30, alpha)).save(tmp_path / "1.png")
    assert read_pictures(tmp_path, 16)[0].alpha is None


def test_what_is_no_picture_is_skipped_and_named(tmp_path, caplog):
    Image.fromarray(gradient()).save(tmp_path / "2.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.png").unlink()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "captions.txt").write_text("a cat")
    (tmp_path / ".DS_Store").write_bytes(b"\0\1")
    assert [picture.path.name for picture in read_pictures(tmp_path, 16)] == ["2.png"]
    lines = [record.getMessage() for record in caplog.records]
    for name in ("1.png", "captions.txt", ".DS_Store"):
        assert len([line for line in lines if str(tmp_path / name) in line and "skipped" in line]) == 1
    assert not any("2.png" in line for line in lines)


def test_folders_in_the_folder_are_not_entered(pictures_folder):
    (pictures_folder / "masks").mkdir()
    Image.new("L", (16, 16)).save(pictures_folder / "masks" / "1.png")
    assert len(read_pictures(pictures_folder, 16)) == 3


def test_no_picture_no_folder_and_too_small_a_picture(tmp_path, pictures_folder):
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        read_pictures(tmp_path / "nowhere", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no picture"):
        read_pictures(tmp_path / "empty", 16)
    Image.new("RGB", (30, 3)).save(pictures_folder / "small.png")
    with pytest.raises(ValueError, match=r"small\.png is 30×3 pixels; expected at least 4"):
        read_pictures(pictures_folder, 16, smallest=4)
    assert len(read_pictures(pictures_folder, 16, smallest=3)) == 4


def test_centre_crop_is_in_the_middle_and_another_crop_follows_the_seed(tmp_path):
    wide = gradient(64, 16)
    for name in ("1.png", "2.png"):
        Image.fromarray(wide).save(tmp_path / name)
    (centre, _) = read_pictures(tmp_path, 16, center_crop=True)
    assert np.array_equal(pixels(centre), wide[:, 24:40])
    assert centre.box == (0.375, 0, 0.625, 1)

    places = [[picture.box for picture in read_pictures(tmp_path, 16, seed=seed)] for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    assert places[0][0] != places[0][1]
    for left, top, right, bottom in places[0]:
        assert left >= 0 and right <= 1 and (top, bottom) == (0, 1)


def test_crop_like_cuts_another_image_as_the_picture_was_cut(tmp_path):
    wide = gradient(64, 16)
    Image.fromarray(wide).save(tmp_path / "1.png")
    for seed in range(3):
        (picture,) = read_pictures(tmp_path, 8, seed=seed)
        red = np.asarray(picture.crop_like(Image.fromarray(wide[..., 0])))
        assert np.array_equal(red, pixels(picture)[..., 0])
        # A mask of twice the size is of the same scene.
        twice = Image.fromarray(wide[..., 0]).resize((128, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(picture.crop_like(twice)).astype(int) - pixels(picture)[..., 0]).max() <= 4


def test_to_tensor():
    images = to_tensor([Image.fromarray(gradient()), Image.new("RGB", (16, 16), (255, 0, 51))])
    assert images.shape == (2, 3, 16, 16)
    assert images[0, 0, 0].tolist() == pytest.approx([i / 15 for i in range(16)])
    assert images[1, :, 3, 3].tolist() == pytest.approx([1, 0, 0.2])
    assert to_tensor([Image.new("L", (4, 2), 255)]).shape == (1, 1, 2, 4)


def test_latents_of_a_tiny_autoencoder():
    vae = make_vae(AutoencoderTiny)
    vae.register_to_config(scaling_factor=0.5)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encode_latents(vae, images), 0.5 * vae.encode(images * 2 - 1).latents)


def test_latents_of_a_variational_autoencoder_are_the_mode():
    vae = make_vae(AutoencoderKL)
    vae.register_to_config(shift_factor=0.1)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mean = vae.encode(images * 2 - 1).latent_dist.mean
    latents = encode_latents(vae, images)
    torch.testing.assert_close(latents, (mean - 0.1) * vae.config.scaling_factor)
    assert vae.config.scaling_factor != 1
    assert torch.equal(latents, encode_latents(vae, images))
    assert encode_latents(vae.to(torch.bfloat16), images).dtype == torch.float32
