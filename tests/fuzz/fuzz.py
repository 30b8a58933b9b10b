"""Damaged concept files, headers and training images: each must be read, or be refused in one sentence.

    python tests/fuzz/fuzz.py --cases 100000

The cases follow from the seed and their numbers alone. Of a case with another outcome the number is printed, and
`--first NUMBER --cases 1` runs it again.
"""

import argparse
import io
import json
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.cli.sharing import info
from diffusers_perfusion.concept_file import HEADER_KEY, WEIGHT_NAME, ConceptHeader
from diffusers_perfusion.training.images import read_images

SEED = 0

Json = Any


class Report(NamedTuple):
    """How often each kind of case had each outcome, and a line on each case with an outcome that it may not have."""

    outcomes: Counter[tuple[str, str]]
    failures: list[str]


def run(cases: int, first: int = 0, seed: int = SEED, progress: bool = False) -> Report:
    """Run cases from a number on, and report how they came out."""
    report = Report(Counter(), [])
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in tqdm(range(first, first + cases), disable=not progress):
                rng = random.Random(f"{seed}-{number}")
                kind = list(KINDS)[number % len(KINDS)]
                make, read = KINDS[kind]
                path = Path(folder) / "case" / "file"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(make(rng))
                try:
                    report.outcomes[kind, outcome(read, path)] += 1
                except Exception as error:
                    message = str(error).replace(folder, "")[:500]
                    report.failures.append(f"case {number} ({kind}): {type(error).__name__}: {message}")
    finally:
        logging.disable(logging.NOTSET)
    return report


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    """Return whether a file is read or refused in one sentence, or raise what else happens."""
    try:
        read(path)
    except ValueError as error:
        message = str(error)
        if type(error) is not ValueError or not message.isprintable() or len(message) > 1000:
            raise
        if str(path.parent) not in message:
            raise AssertionError(f"the file is not named: {message}") from error
        return "refused"
    return "valid"


# Reading


def read_concept(path: Path) -> None:
    """Read a concept file; its header alone must be accepted or refused alike, but for the numbers."""
    header: ConceptHeader | None = None
    refused = ""
    try:
        header = ConceptHeader.read(path)
    except ValueError as error:
        refused = str(error)
    try:
        concept = PerfusionConcept.load(path)
    except ValueError as error:
        of_numbers = "holds NaN or infinity" in str(error) or "‖i‖²" in str(error)
        if str(error) != refused and not (header and of_numbers):
            raise AssertionError(f"of the header: {refused or 'valid'}; of the file: {error}") from error
        raise
    if header is None:
        raise AssertionError(f"of the header: {refused}; of the file: valid")
    if concept.training != header.training or concept.width != header.width:
        raise AssertionError("the header is that of another concept")
    if not all(tensor.isfinite().all() for _, tensor in concept._tensors()):
        raise AssertionError("NaN was loaded")


def read_header(path: Path) -> None:
    """Read a concept file, and print its description, which must be short and without control characters."""
    read_concept(path)
    with redirect_stdout(io.StringIO()) as output:
        info(str(path), WEIGHT_NAME, None, None, None)
    printed = output.getvalue()
    if len(printed) > 50_000 or not printed.replace("\n", "").isprintable():
        raise AssertionError(f"{len(printed)} characters were printed: {printed!r:.200}")


def read_image(path: Path) -> None:
    """Read a training image, as the only one in its folder."""
    (image,) = read_images(path.parent, 16)
    if image.image.size != (16, 16) or image.image.mode != "RGB":
        raise AssertionError(f"an image {image.image} was read")


# Damage


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with a few changes, half of them near the beginning."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 1, 2, 8])):
        end = max(1, len(data) if rng.random() < 0.5 else len(data) // 8)
        start = rng.randrange(end)
        length = rng.choice([1, 1, 2, 8, 64])
        part = data[start : start + length]
        data[start : start + length] = rng.choice(
            [
                bytes(byte ^ (1 << rng.randrange(8)) for byte in part),
                rng.randbytes(len(part)),
                bytes(len(part)),
                b"\xff" * len(part),
                b"",
                part + part,
                rng.randbytes(length) + part,
                part[::-1],
            ]
        )
        if rng.random() < 0.05:
            del data[start:]
    return bytes(data)


def good_concept() -> bytes:
    """Return the bytes of a small concept file."""
    generator = torch.Generator().manual_seed(0)
    one, other, embedding, output = torch.randn(4, 64, generator=generator)
    concept = PerfusionConcept(
        placeholder_token="<my-cat>",
        superclass="tabby cat",
        token_embeddings=[embedding],
        target_input=one,
        inverse_target_input=one,
        superclass_input=other,
        inverse_superclass_input=other,
        target_outputs={"down.attn2": output, "mid.attn2": -output},
        base_model="a/model",
        training={"steps": 400, "rates": [0.1, {"a": None}]},
    )
    with tempfile.TemporaryDirectory() as folder:
        return concept.save(Path(folder) / WEIGHT_NAME).read_bytes()


CONCEPT = good_concept()
ODD: list[Json] = [
    *(None, True, 0, -1, 1, 3, 8, 2**31, 2**63, 2**64, 10**400, 1e-320, 1e308, float("inf"), float("nan")),
    *("", " ", "x" * 300, "\x1b[2J", "\u202e", "\ud800", "\0", "<>", "F16", "BF16", "F32", "F64", "U8", "perfusion"),
    *([], {}, [[]], [0, 1], [1, 0], ["a"], {"a": "b"}, [[]] * 5000, {str(n): n for n in range(2000)}),
    *("target_outputs.", "token_embeddings.1", "target_outputs.\n", "__metadata__", "format_version"),
]


def damaged_file(rng: random.Random) -> bytes:
    """Return a concept file with damaged bytes."""
    return damaged(rng, CONCEPT)


def damaged_header(rng: random.Random) -> bytes:
    """Return a concept file whose header is JSON and has odd parts."""
    end = 8 + int.from_bytes(CONCEPT[:8], "little")
    header = json.loads(CONCEPT[8:end])
    description = json.loads(header["__metadata__"][HEADER_KEY])
    for _ in range(rng.choice([1, 1, 1, 2])):
        if rng.random() < 0.6:
            description = changed(rng, description)
            header["__metadata__"] = {HEADER_KEY: json.dumps(description)}
        else:
            header = changed(rng, header)
            if not isinstance(header, dict):
                break
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode(errors="replace")
    length = len(text) if rng.random() < 0.9 else rng.choice([0, len(text) - 1, len(text) + 1, 2**18, 2**63])
    return length.to_bytes(8, "little") + text + CONCEPT[end:]


def changed(rng: random.Random, value: Json) -> Json:
    """Return JSON with an odd part in some place."""
    parts = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not parts or rng.random() < 0.1:
        return rng.choice([*ODD, [value], {"a": value}, nested(rng.choice([10, 20, 200, 500]))])
    part = rng.choice(parts)
    value = value.copy()
    what = rng.random()
    if what < 0.7:
        value[part] = changed(rng, value[part])
    elif what < 0.8:
        del value[part]
    elif isinstance(value, dict):
        value[rng.choice([odd for odd in ODD if isinstance(odd, str)])] = value.pop(part)
    return value


def nested(depth: int) -> Json:
    """Return lists in each other."""
    value: Json = []
    for _ in range(depth - 1):
        value = [value]
    return value


def exif_data() -> bytes:
    """Return Exif data that turn an image by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a cat"
    return exif.tobytes()


def pictures() -> list[tuple[str, Image.Image, dict[str, Any]]]:
    """Return images and how to save them: with transparency, animation, Exif data and more than eight bits."""
    grey = Image.radial_gradient("L").resize((24, 20))
    image = Image.merge("RGB", [grey, grey.rotate(90), grey.rotate(180)])
    return [
        ("PNG", image, {"exif": EXIF}),
        ("PNG", image.quantize(16), {"transparency": 3}),
        ("PNG", Image.merge("RGBA", [*image.split(), grey]), {}),
        ("PNG", grey.convert("I;16"), {}),
        ("JPEG", image, {"exif": EXIF}),
        ("JPEG", image.convert("CMYK"), {"progressive": True}),
        ("WEBP", image, {"exif": EXIF, "lossless": True}),
        ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("TIFF", image, {"exif": EXIF}),
        ("TIFF", grey.convert("F"), {}),
        ("BMP", image, {}),
        ("PPM", image, {}),
        ("ICO", image, {}),
        ("TGA", image, {"compression": "tga_rle"}),
    ]


EXIF = exif_data()
PICTURES = pictures()


def damaged_image(rng: random.Random) -> bytes:
    """Return an image file with damaged bytes, or one around damaged Exif data."""
    if rng.random() < 0.3:
        kind, image, options = rng.choice([picture for picture in PICTURES if "exif" in picture[2]][:3])
        return saved(kind, image, options | {"exif": damaged(rng, EXIF)})
    return damaged(rng, saved(*rng.choice(PICTURES)))


def saved(kind: str, image: Image.Image, options: dict[str, Any]) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


KINDS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path], None]]] = {
    "concept file": (damaged_file, read_concept),
    "header": (damaged_header, read_header),
    "training image": (damaged_image, read_image),
}


def main() -> int:
    """Run the cases that the command line asks for, and print how they came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="How many. Default: 2000.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first. Default: 0.")
    parser.add_argument("--seed", type=int, default=SEED, help=f"Seed of them all. Default: {SEED}.")
    arguments = parser.parse_args()
    report = run(arguments.cases, arguments.first, arguments.seed, progress=True)
    for (kind, outcome), count in sorted(report.outcomes.items()):
        print(f"{kind:15} {outcome:8} {count:8,}")
    print(f"{'anything else':24} {len(report.failures):8,}")
    for failure in report.failures[:20]:
        print(failure, file=sys.stderr)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
