"""Rasterise the icons of the pocket world.

npm install --prefix icons @iconify-json/{noto,noto-v1,twemoji,fluent-emoji-flat,fluent-emoji}
pip install resvg-py
python examples/pocket/recipe/rasterise.py --icons_dir icons/node_modules/@iconify-json --output sprites.npz
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from files import finished
from icons import BASE_RENDITIONS, CONCEPT_RENDITION, NOUNS, WORN
from PIL import Image


def svg(collection, name, side):
    """An icon of an Iconify collection as SVG to be drawn with a side of pixels, or None if it has no such icon."""
    while name in (aliases := collection.get("aliases", {})):
        name = aliases[name]["parent"]
    icon = collection["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(axis, collection.get(axis, 16)) for axis in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" '
        f'viewBox="{collection.get("left", 0)} {collection.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )


def rasterise(text, side):
    """An SVG as a sprite with a side of pixels: cropped to what is drawn, in the middle of a square."""
    import resvg_py  # needed by this stage alone

    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text)))).convert("RGBA")
    image = image.crop(image.getbbox())
    longer = max(image.size)
    square = Image.new("RGBA", (longer, longer))
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return np.array(square.resize((side, side), Image.Resampling.LANCZOS))


def main(args=None):
    """Write the sprites of every rendition, under "<rendition>/<icon>"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons_dir", type=Path, required=True, help="With a folder for each of the npm packages.")
    parser.add_argument("--side", type=int, default=80, help="Of a sprite; a multiple of 80.")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    sprites = {}
    for rendition in (*BASE_RENDITIONS, CONCEPT_RENDITION):
        collection = json.loads((arguments.icons_dir / rendition / "icons.json").read_text())
        for icon in (*NOUNS, *WORN):
            if text := svg(collection, icon, 96 * arguments.side // 80):
                sprites[f"{rendition}/{icon}"] = rasterise(text, arguments.side)
    with finished(arguments.output) as path, open(path, "wb") as file:
        np.savez_compressed(file, **sprites)
    print(f"{arguments.output}: {len(sprites)} sprites")


if __name__ == "__main__":
    main()
