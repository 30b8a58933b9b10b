import numpy as np
import pytest
from PIL import Image

from diffusers_perfusion.image_files import read_image


def pixels(path):
    return np.asarray(read_image(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "RGB"])
def test_an_image_is_rgba_only_if_it_is_transparent_anywhere(tmp_path, mode):
    Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / "1.tif")
    image = read_image(tmp_path / "1.tif")
    assert image.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    assert image.convert("RGB").getextrema() == ((255, 255),) * 3


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "1.png"
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"^{path} is no image that Pillow can read; convert it to PNG or JPEG$"):
        read_image(path)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "1.png")
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "2.png", transparency=5)
    for path in tmp_path.iterdir():
        assert np.array_equal(pixels(path), np.full((16, 16, 3), 128))


@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint16])
def test_white_of_floats_and_long_integers_is_the_smallest_that_holds_them(tmp_path, white, kind):
    grey = np.linspace(0, 255, 256).reshape(16, 16)
    Image.fromarray((grey / 255 * white).astype(kind)).save(tmp_path / "1.tif")
    expected = (grey / 255 * white).astype(kind).astype(float) / white * 255
    assert np.abs(pixels(tmp_path / "1.tif")[..., 0] - expected).max() <= 0.5


@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize("highlight", [1.02, 1.5, np.inf])
def test_highlights_of_floats_turn_no_image_black(tmp_path, white, highlight):
    grey = np.full((16, 16), white / 2, np.float32)
    grey[0, 0] = white * highlight
    Image.fromarray(grey).save(tmp_path / "1.tif")
    assert pixels(tmp_path / "1.tif")[0, :2, 0].tolist() == [255, 128]


def test_floats_that_are_no_numbers_are_black(tmp_path):
    grey = np.full((16, 16), 0.5, np.float32)
    grey[0, 0], grey[0, 1], grey[0, 2] = np.nan, -np.inf, -3
    Image.fromarray(grey).save(tmp_path / "1.tif")
    assert pixels(tmp_path / "1.tif")[0, :4, 0].tolist() == [0, 0, 0, 128]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_images_in_a_file_the_first_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"1.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    assert set(map(tuple, pixels(tmp_path / f"1.{kind}").reshape(-1, 3))) == {(255, 0, 0)}
