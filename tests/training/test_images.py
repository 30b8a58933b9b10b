import struct

import numpy as np
import pytest
from PIL import Image
from PIL.ImageFile import ImageFile

from diffusers_perfusion.training.images import read_images, to_tensor


def gradient(width=16, height=16):
    """An image in which every pixel tells where it is: red to the right, green down."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], -1).astype(np.uint8)


def pixels(image):
    return np.asarray(image.image).astype(int)


def test_images_come_in_the_order_of_their_names_and_square(tmp_path):
    for name, size in {"b.png": (20, 16), "a.jpg": (16, 30), "c.webp": (40, 40)}.items():
        Image.new("RGB", size, "red").save(tmp_path / name)
    images = read_images(tmp_path, 16)
    assert [image.path.name for image in images] == ["a.jpg", "b.png", "c.webp"]
    assert {image.image.size for image in images} == {(16, 16)}


def test_exif_rotation_is_applied(tmp_path):
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "1.png", exif=exif)
    (image,) = read_images(tmp_path, 16)
    assert np.array_equal(pixels(image), upright)


def broken_exif(path):
    """Write an image with Exif data that are not TIFF."""
    Image.fromarray(gradient()).save(path, exif=b"Exif\0\0broken!!")


def test_an_image_with_broken_exif_data_is_used_as_it_is_with_a_line(tmp_path, caplog):
    broken_exif(tmp_path / "1.png")
    (image,) = read_images(tmp_path, 16)
    assert np.array_equal(pixels(image), gradient())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}/1.png is not rotated, because its Exif data cannot be read (")


@pytest.mark.parametrize("error", [SyntaxError("x"), IndexError("x"), struct.error("x"), MemoryError(), OSError("x")])
@pytest.mark.parametrize("late", [False, True])
def test_whatever_a_decoder_raises_the_image_is_named_and_skipped(images_folder, monkeypatch, caplog, error, late):
    class Broken(ImageFile):
        format = "BROKEN"

        def _open(self):
            self._mode, self._size = "RGB", (16, 16)
            if not late:
                raise error

        def load(self):
            raise error

    Image.init()
    monkeypatch.setattr(Image, "ID", [*Image.ID, "BROKEN"])
    monkeypatch.setitem(Image.OPEN, "BROKEN", (Broken, lambda data: data.startswith(b"broken")))
    (images_folder / "2.png").write_bytes(b"broken")
    assert [image.path.name for image in read_images(images_folder, 16)] == ["1.png", "3.png"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{images_folder}/2.png ") and line.endswith("; it is skipped.")
    assert "()" not in line


def test_a_kind_of_file_that_is_unknown_can_be_converted(images_folder, caplog):
    (images_folder / "4.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    read_images(images_folder, 16)
    assert f"{images_folder}/4.heic is no image that Pillow can read; convert it to PNG or JPEG; it is" in caplog.text


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
    (image,) = read_images(tmp_path, 16)
    assert image.image.mode == "RGB"
    assert np.array_equal(pixels(image), np.stack([grey] * 3, -1))
    assert image.alpha is None


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
    (image,) = read_images(tmp_path, 16)
    assert image.alpha.mode == "L"
    assert np.array_equal(np.asarray(image.alpha), np.repeat([[0] * 8 + [255] * 8], 16, 0))
    assert set(pixels(image)[:, :8].ravel()) == {128}
    assert set(pixels(image)[:, 8:].ravel()) == {200}


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_a_constant_alpha_channel_counts_as_none(tmp_path, alpha):
    Image.new("RGBA", (16, 16), (10, 20, 30, alpha)).save(tmp_path / "1.png")
    assert read_images(tmp_path, 16)[0].alpha is None


@pytest.mark.parametrize(
    "name", ["my bear.png", "\N{BEAR FACE}.png", "a'b\"c.png", "1.2.3.png", "new\nline.png", "UP.PNG"]
)
def test_images_may_have_any_name(tmp_path, name):
    Image.fromarray(gradient()).save(tmp_path / name)
    (image,) = read_images(tmp_path, 16)
    assert image.path.name == name


def test_files_that_are_no_images_are_skipped_with_a_line(tmp_path, caplog):
    Image.fromarray(gradient()).save(tmp_path / "2.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.png").unlink()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "captions.txt").write_text("a cat")
    (tmp_path / ".DS_Store").write_bytes(b"\0\1")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert [image.path.name for image in read_images(tmp_path, 16)] == ["2.png"]
    lines = [record.getMessage() for record in caplog.records]
    for name in ("1.png", "captions.txt", ".DS_Store", "empty.jpg", "nowhere.jpg", "loop.jpg"):
        assert len([line for line in lines if str(tmp_path / name) in line and "skipped" in line]) == 1
    assert not any("2.png" in line for line in lines)


def test_subfolders_are_not_read(images_folder):
    (images_folder / "masks").mkdir()
    Image.new("L", (16, 16)).save(images_folder / "masks" / "1.png")
    (images_folder / "4.jpg").mkdir()
    assert len(read_images(images_folder, 16)) == 3


def test_bad_folders_and_images_are_refused(tmp_path, images_folder):
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        read_images(tmp_path / "nowhere", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no image; expected .* not in folders in it"):
        read_images(tmp_path / "empty", 16)
    Image.new("RGB", (30, 3)).save(images_folder / "small.png")
    with pytest.raises(ValueError, match=r"small\.png is 30×3 pixels; expected at least 4"):
        read_images(images_folder, 16, min_side=4)
    assert len(read_images(images_folder, 16, min_side=3)) == 4


def test_centre_crop_is_in_the_middle_and_another_crop_follows_the_seed(tmp_path):
    wide = gradient(64, 16)
    for name in ("1.png", "2.png"):
        Image.fromarray(wide).save(tmp_path / name)
    (centre, _) = read_images(tmp_path, 16, center_crop=True)
    assert np.array_equal(pixels(centre), wide[:, 24:40])
    assert centre.box == (0.375, 0, 0.625, 1)

    places = [[image.box for image in read_images(tmp_path, 16, seed=seed)] for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    assert places[0][0] != places[0][1]
    for left, top, right, bottom in places[0]:
        assert left >= 0 and right <= 1 and (top, bottom) == (0, 1)


def test_crop_like_crops_another_image_the_same(tmp_path):
    wide = gradient(64, 16)
    Image.fromarray(wide).save(tmp_path / "1.png")
    for seed in range(3):
        (image,) = read_images(tmp_path, 8, seed=seed)
        red = np.asarray(image.crop_like(Image.fromarray(wide[..., 0])))
        assert np.array_equal(red, pixels(image)[..., 0])
        # A mask of twice the size is of the same scene.
        twice = Image.fromarray(wide[..., 0]).resize((128, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image.crop_like(twice)).astype(int) - pixels(image)[..., 0]).max() <= 4


def test_to_tensor():
    images = to_tensor([Image.fromarray(gradient()), Image.new("RGB", (16, 16), (255, 0, 51))])
    assert images.shape == (2, 3, 16, 16)
    assert images[0, 0, 0].tolist() == pytest.approx([i / 15 for i in range(16)])
    assert images[1, :, 3, 3].tolist() == pytest.approx([1, 0, 0.2])
    assert to_tensor([Image.new("L", (4, 2), 255)]).shape == (1, 1, 2, 4)
