"""Grids of small pictures, drawn large, with headings."""
from __future__ import annotations

from typing import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

Tensor = torch.Tensor

INK, QUIET, PAPER = "#1b1b1b", "#666666", "#ffffff"


def enlarge(picture: Tensor, scale: int) -> Image.Image:
    """A picture, each side `scale` times as long: (3, height, width) in colour, or (height, width), -1 paper to 1 ink.

    Bicubic in grey, because a digit of 8 x 8 squares is hard to read; values are not clipped before it.
    """
    height, width = picture.shape[-2:]
    if picture.ndim == 3:
        colour = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        return Image.fromarray(colour).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    grey = ((1.0 - picture.float()) * 0.5).numpy()
    large = Image.fromarray(grey).resize(
        (width * scale, height * scale), Image.Resampling.BICUBIC)
    return large.point(lambda value: value * 255.0 + 0.5).convert("L")


def cell(pictures: Tensor, columns: int, scale: int, gap: int = 2) -> Image.Image:
    """Pictures of shape (count, height, width), or (count, 3, height, width), side by side, `columns` to a row."""
    count, height, width = len(pictures), *pictures.shape[-2:]
    rows = -(-count // columns)
    size = columns * (width * scale + gap) - gap, rows * (height * scale + gap) - gap
    out = Image.new("RGB", size, (235,) * 3) if pictures.ndim == 4 else Image.new("L", size, 200)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        out.paste(enlarge(picture, scale), (column * (width * scale + gap), row * (height * scale + gap)))
    return out


def grid(cells: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str], corner: str = "",
         scale: int = 8, across: int = 2, notes: Sequence[Sequence[str]] = ()) -> Image.Image:
    """A table of cells with headings.

    Args:
        cells: [row][column] -> pictures as for `cell`; all cells alike.
        rows, columns: headings; a row's may hold line breaks.
        corner: what the columns' headings are, above the rows' headings.
        notes: [row][column] -> a line under the cell; empty for none.
    """
    drawn = [[cell(pictures, across, scale) for pictures in row] for row in cells]
    wide, high = drawn[0][0].size
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    left = 24 + max(int(ruler.multiline_textbbox((0, 0), text, font=font)[2]) for text in (*rows, corner))
    foot = 20 if notes else 0
    gap, top = 12, 38
    out = Image.new("RGB", (left + len(columns) * (wide + gap), top + len(rows) * (high + foot + gap)), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((10, top / 2), corner, QUIET, font, anchor="lm")
    for c, text in enumerate(columns):
        draw.text((left + c * (wide + gap) + wide / 2, top / 2), text, INK, font, anchor="mm")
    for r, text in enumerate(rows):
        y = top + r * (high + foot + gap)
        draw.multiline_text((10, y + high / 2), text, INK, font, anchor="lm")
        for c, image in enumerate(drawn[r]):
            x = left + c * (wide + gap)
            out.paste(image, (x, y))
            if notes:
                draw.text((x + wide / 2, y + high + 11), notes[r][c], QUIET, small, anchor="mm")
    return out
