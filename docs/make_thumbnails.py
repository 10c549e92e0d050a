"""Draw the pictures beside workflows/*.json, 480 x 480: what each workflow compares, by the demo's own small network.

    python docs/make_thumbnails.py
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ersde  # noqa: E402
from ersde import plot  # noqa: E402
from ersde.demo.mixture import flow_schedule, karras  # noqa: E402
from ersde.demo.network import guided, load_model  # noqa: E402
from ersde.noise_scale import from_points  # noqa: E402

SIDE, GAP, HEAD = 480, 6, 30
SEED = 11
INK, PAPER = "#1b1b1b", "#ffffff"


def sample(process="ve", labels=("face",), preset="sde_5", steps=24, cfg=3.0, seed=SEED, x=None, sigmas=None, **changes):
    """Pictures of shape (labels, 3, 32, 32) in [-1, 1], the same noise for each call."""
    sigmas = (karras(steps) if process == "ve" else flow_schedule(steps)) if sigmas is None else sigmas
    if x is None:
        x = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * sigmas[0].float()
    model = guided(load_model(process), list(labels), cfg)
    return ersde.sample_preset(model, x, sigmas.float(),
                               ersde.get_preset(preset).replace(**changes), {"seed": seed}, disable=True, process=process,
                               excess=model.excess)


def tile(picture, side):
    data = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(data).resize((side, side), Image.Resampling.BICUBIC)


def sheet(columns, heads, title):
    """Columns of pictures, their headings below, SIDE x SIDE in all; the page's own label covers the upper left corner."""
    rows = max(map(len, columns))
    foot = 2 * HEAD if any(heads) else HEAD
    side = min((SIDE - GAP) // len(columns), (SIDE - foot) // rows) - GAP
    out = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(out)
    big, small = ImageFont.load_default(20), ImageFont.load_default(15)
    draw.text((SIDE / 2, SIDE - HEAD / 2), title, INK, big, anchor="mm")
    left = (SIDE - len(columns) * (side + GAP) + GAP) // 2
    for c, (pictures, head) in enumerate(zip(columns, heads)):
        x = left + c * (side + GAP)
        draw.text((x + side / 2, SIDE - HEAD * 1.4), head, INK, small, anchor="mm")
        for r, picture in enumerate(pictures):
            out.paste(tile(picture, side), (x, GAP + r * (side + GAP)))
    return out


THREE = ("face", "flag", "sign")
FOUR = ("face", "flag", "animal", "sign")
NINE = ("face", "animal", "flag", "person", "shape", "plant", "sign", "vehicle", "hand")


def text_to_image():
    pictures = sample(labels=NINE, steps=30)
    return sheet([pictures[i::3] for i in range(3)], [""] * 3, "text to image")


def flow():
    pictures = sample("flow", NINE, steps=30)
    return sheet([pictures[i::3] for i in range(3)], [""] * 3, "flow model")


def few_steps():
    columns = [sample("flow", THREE, preset, steps=6, cfg=4.0) for preset in ("few_steps", "comfyui")]
    return sheet(columns, ["few_steps", "er_sde"], "6 steps")


def image_to_image():
    sigmas, labels = karras(40), ("face", "flag", "sign")
    source = sample(labels=labels, steps=30)
    start = source + torch.randn(source.shape, generator=torch.Generator().manual_seed(3)) * sigmas[18].float()
    columns = [source, sample(labels=labels, preset="texture", x=start, sigmas=sigmas[18:])]
    return sheet(columns, ["from", "to"], "image to image")


def eta():
    values = (0.0, 0.3, 0.6, 1.0)
    return sheet([sample(labels=FOUR, preset="sde", eta=value, steps=30) for value in values],
                 [f"eta {value:g}" for value in values], "side by side: eta")


def noise_scales():
    names = ("ode", "sde_5", "sde_4", "sde")
    return sheet([sample(labels=FOUR, preset=name, steps=30) for name in names], names, "side by side: noise scales")


def two_stages():
    sigmas = karras(24)
    half = sample(labels=THREE, preset="sde", sigmas=sigmas[:15])
    done = sample(labels=THREE, preset="ode", x=half, sigmas=sigmas[14:])
    return sheet([half / (1 + sigmas[14].float() ** 2).sqrt(), done], ["after the first", "after the second"], "two stages")


def charts():
    scale = from_points([(0.03, 1.0), (0.5, 1.0), (3.0, 3.0), (15.0, 20.0)])
    plan = plot.make_plot_plan(karras(24), "ve", scale)
    image = plot.to_image(plot.plot_run(plan, "ve", scale))
    out = Image.new("RGB", (SIDE, SIDE), PAPER)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out.paste(image, (0, (SIDE - image.height) // 2))
    ImageDraw.Draw(out).text((SIDE / 2, SIDE - HEAD / 2), "the plot, and a curve of your own", INK,
                             ImageFont.load_default(20), anchor="mm")
    return out


ALL = {"text_to_image": text_to_image, "flow": flow, "few_steps": few_steps, "image_to_image": image_to_image, "eta": eta,
       "noise_scales": noise_scales, "two_stages": two_stages, "plot": charts}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, draw in ALL.items():
        path = ROOT / "workflows" / f"ersde_{name}.jpg"
        draw().save(path, quality=85, optimize=True)
        print("written:", path.relative_to(ROOT), path.stat().st_size)
