"""Openly licensed pictures with names, in several drawing styles, out of npm packages.

Twemoji (CC BY 4.0), Noto Emoji (Apache 2.0), Fluent Emoji (MIT) and OpenMoji (CC BY-SA 4.0) draw the
same things. Needs `npm` to fetch the packages and, for OpenMoji's drawings, `pip install cairosvg`.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

STYLES = {  # style -> npm package, folder of the pictures within it
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/"),
    "openmoji": ("openmoji@17.0.0", "package/color/svg/"),
}
_NAMES = "package/emoji.json"
_SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")


@dataclass(frozen=True)
class Pictures:
    """Pictures of named things in several styles."""

    pixels: Tensor  # (count, 4, size, size), RGBA from -1 to 1, colours premultiplied
    prompts: tuple[str, ...]  # of every picture: its name, then its category
    styles: tuple[str, ...]  # of every picture
    themes: tuple[str, ...]  # category of every picture

    def chosen(self, style: str | None = None, theme: str | None = None) -> Tensor:  # (any,)
        """Returns the places of the pictures of a style, or of a theme, or of both."""
        pairs = zip(self.styles, self.themes, strict=True)
        return torch.tensor(
            [i for i, (s, t) in enumerate(pairs) if style in (None, s) and theme in (None, t)]
        )


def load_pictures(folder: Path, size: int) -> Pictures:
    """Returns all pictures at a size in pixels; the packages are fetched to the folder once."""
    cache = folder / f"pictures-{size}.pt"
    if not cache.exists():
        torch.save(_read_all(folder, size), cache)
    return Pictures(**torch.load(cache))


def _read_all(folder: Path, size: int) -> dict[str, object]:
    archives = {style: _fetch(package, folder) for style, (package, _) in STYLES.items()}
    with tarfile.open(archives["twemoji"]) as archive:
        entries = json.load(archive.extractfile(_NAMES))  # type: ignore[arg-type]
    known = {_code(entry["image"]): entry for entry in entries}
    pixels, prompts, styles, themes = [], [], [], []
    for style, (_, inside) in STYLES.items():
        for code, data in sorted(_files(archives[style], inside, known).items()):
            image = _decoded(data, size)
            if image is None:
                continue
            name = known[code]["name"] or known[code]["short_name"].replace("_", " ")
            theme = known[code]["category"]
            pixels.append(image)
            prompts.append(f"{name}, {theme}".lower())
            styles.append(style)
            themes.append(theme)
    return {
        "pixels": torch.stack(pixels),
        "prompts": tuple(prompts),
        "styles": tuple(styles),
        "themes": tuple(themes),
    }


def _fetch(package: str, folder: Path) -> Path:
    """Returns the path of a package's archive, which npm writes into the folder."""
    scope, _, rest = package.rpartition("@")
    path = folder / f"{scope.removeprefix('@').replace('/', '-')}-{rest}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    return path


def _files(archive: Path, inside: str, known: Collection[str]) -> dict[str, bytes]:
    """Returns the files of the known pictures without a skin tone, by code."""
    files = {}
    with tarfile.open(archive) as file:
        for member in file:
            code = _code(member.name.removeprefix(inside))
            toned = any(tone in code for tone in _SKIN_TONES)
            if member.name.startswith(inside) and code in known and not toned:
                files[code] = file.extractfile(member).read()  # type: ignore[union-attr]
    return files


def _code(name: str) -> str:
    """Returns a picture's code points, spelled the same in all packages."""
    return name.rsplit(".", 1)[0].lower().replace("-fe0f", "")


def _decoded(data: bytes, size: int) -> Tensor | None:  # (4, size, size), -1 to 1
    """Returns a picture; None for a drawing that CairoSVG cannot draw."""
    if data.lstrip().startswith(b"<"):
        import cairosvg  # noqa: PLC0415 - for one of the packages alone

        try:
            data = cairosvg.svg2png(data, output_width=72, output_height=72)
        except (AttributeError, ValueError):  # markers that are named and not there
            return None
    with Image.open(io.BytesIO(data)) as image:
        premultiplied = image.convert("RGBA").convert("RGBa")
        small = premultiplied.resize((size, size), Image.Resampling.BOX)
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return values.view(size, size, 4).permute(2, 0, 1).float() / 127.5 - 1
