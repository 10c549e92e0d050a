"""Write workflows/*.json for ComfyUI's canvas: the graphs below, laid out by the real page.

    python docs/make_workflows.py http://127.0.0.1:8188 [--screenshots DIR]

needs a running ComfyUI with this pack, playwright, and Chromium (on PATH, or as playwright installs it).  The pictures
beside the files come from docs/make_thumbnails.py.
"""
import argparse
import json
import shutil
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
PICTURE = Path(__file__).resolve().parent / "comfyui.png"         # the README's, of the first workflow
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
SD35 = "sd3.5_large_fp8_scaled.safetensors"
GET_SD15 = f"""**Model**: `{SD15}` into `models/checkpoints`, from huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive."""
GET_SD35 = f"""**Model**: `{SD35}` into `models/checkpoints`, from huggingface.co/Comfy-Org/stable-diffusion-3.5-fp8."""
AS_PRESET = {"noise_scale": "as preset", "eta": -1.0, "s_noise": -1.0, "order": 0}
PROMPT = "a lighthouse on a cliff at dusk, warm light in the windows, waves, detailed oil painting"
NEGATIVE = "blurry, low quality, watermark"


class Graph:
    """A graph in the API's form, with the columns in which its nodes stand."""

    def __init__(self, note):
        self.note, self.nodes, self.columns, self.titles, self.sizes = note, {}, [[]], {}, {}

    def column(self):
        self.columns.append([])

    def add(self, kind, /, title=None, **inputs):
        key = str(len(self.nodes) + 1)
        self.nodes[key] = {"class_type": kind, "inputs": inputs}
        self.columns[-1].append(key)
        if title:
            self.titles[key] = title
        return key

    def checkpoint(self, name):
        model = self.add("CheckpointLoaderSimple", ckpt_name=name)
        positive = self.add("CLIPTextEncode", "Prompt", text=PROMPT, clip=[model, 1])
        negative = self.add("CLIPTextEncode", "Negative prompt", text=NEGATIVE, clip=[model, 1])
        self.model, self.positive, self.negative = [model, 0], [positive, 0], [negative, 0]
        self.vae = [model, 2]

    def empty(self, size, kind="EmptyLatentImage"):
        self.latent = [self.add(kind, width=size, height=size, batch_size=1), 0]

    def sample(self, kind="ERSDE_KSampler", /, title=None, **inputs):
        ours = AS_PRESET if kind.startswith("ERSDE") else {}
        common = {"model": self.model, "seed": 1, "steps": 24, "cfg": 7.0, "scheduler": "karras", "positive": self.positive,
                  "negative": self.negative, "latent_image": self.latent, "denoise": 1.0}
        return self.add(kind, title, **{**common, **ours, **inputs})

    def show(self, sampled, title=None, save=None):
        decoded = self.add("VAEDecode", samples=[sampled, 0], vae=self.vae)
        if save:
            self.add("SaveImage", title, images=[decoded, 0], filename_prefix=save)
        else:
            self.add("PreviewImage", title, images=[decoded, 0])


def text_to_image():
    g = Graph(f"""# Text to image with ER-SDE

{GET_SD15}
For SDXL: `sd_xl_base_1.0.safetensors` from huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, and 1024 x 1024 in the
empty latent.

Choose a **preset** in the sampler: `sde_5` to begin with, `texture` for photographs, `flat` for anime, `sde` for much
variation (30 steps and more). The inputs below it change single settings; hover over one for what it does.""")
    g.checkpoint(SD15)
    g.empty(512)
    g.column()
    run = g.sample(preset="sde_5")
    g.column()
    g.show(run, save="ersde/text_to_image")
    return g


def flow():
    g = Graph(f"""# A flow model, with the custom sampling nodes

{GET_SD35}

Any flow model goes in the same place (Flux, Qwen-Image, Z-Image, Wan, ...): ER-SDE sees what the model is. Use the scheduler
and the cfg that the model wants.

*ER-SDE Sampler* fits every guider and every sigmas, SplitSigmas and FlipSigmas too.""")
    g.checkpoint(SD35)
    g.empty(1024, "EmptySD3LatentImage")
    g.column()
    sampler = g.add("ERSDE_Sampler", preset="sde_5", **AS_PRESET)
    g.column()
    noise = g.add("RandomNoise", noise_seed=1)
    guider = g.add("CFGGuider", model=g.model, positive=g.positive, negative=g.negative, cfg=4.0)
    sigmas = g.add("BasicScheduler", model=g.model, scheduler="sgm_uniform", steps=24, denoise=1.0)
    g.column()
    run = g.add("SamplerCustomAdvanced", noise=[noise, 0], guider=[guider, 0], sampler=[sampler, 0], sigmas=[sigmas, 0],
                latent_image=g.latent)
    g.show(run, save="ersde/flow")
    return g


def few_steps():
    g = Graph(f"""# Few steps

{GET_SD15}

Eight steps: the preset `few_steps` beside ComfyUI's own `er_sde`. It adds no noise, since a run that short cannot smooth it
out again; each long step goes by the variance that the picture itself shows, at no model call.

Also for distilled and Turbo models at 4 to 8 steps: put in their checkpoint and cfg (1 to 2).""")
    g.checkpoint(SD15)
    g.empty(512)
    g.column()
    ours = g.sample("ERSDE_KSampler", "few_steps, 8 steps", preset="few_steps", steps=8, cfg=6.0)
    g.column()
    g.show(ours, "few_steps")
    g.column()
    theirs = g.sample("KSampler", "er_sde, 8 steps", sampler_name="er_sde", steps=8, cfg=6.0)
    g.show(theirs, "er_sde")
    return g


def image_to_image():
    g = Graph(f"""# Image to image

{GET_SD15}

**Picture**: any of yours in Load Image; it is scaled to 512 x 512.

`denoise` 0.55 keeps the composition; raise it for a freer picture. The preset `texture` works on fine detail. The window of
the noise counts from the model's whole schedule, so that it means the same at every denoise.""")
    g.checkpoint(SD15)
    g.column()
    picture = g.add("LoadImage", image="example.png")
    scaled = g.add("ImageScale", image=[picture, 0], upscale_method="lanczos", width=512, height=512, crop="center")
    g.latent = [g.add("VAEEncode", pixels=[scaled, 0], vae=g.vae), 0]
    g.column()
    run = g.sample(preset="texture", denoise=0.55)
    g.column()
    g.show(run, save="ersde/image_to_image")
    return g


def side_by_side(note, runs):
    """The same picture with one setting different in each column."""
    g = Graph(note)
    g.checkpoint(SD15)
    g.empty(512)
    for title, inputs in runs:
        g.column()
        g.show(g.sample("ERSDE_KSampler", title, **inputs), title)
    return g


def eta():
    return side_by_side(f"""# Side by side: eta

{GET_SD15}

The same seed with more and more fresh noise: `eta` 0 is the noise-free ODE, 1 the noise scale as published (here `sde`, the
reverse-time SDE). More noise wants more steps.""", [
        (f"eta {value:g}", dict(preset="sde", eta=value, steps=30)) for value in (0.0, 0.3, 0.6, 1.0)])


def noise_scales():
    return side_by_side(f"""# Side by side: noise scales

{GET_SD15}

The same seed with each kind of noise: none (`ode`), a little and early (`sde_5`, the default), some throughout (`sde_2`),
late (`sde_4`), much (`sde`).""", [
        (name, dict(preset=name, steps=30)) for name in ("ode", "sde_5", "sde_2", "sde_4", "sde")])


def two_stages():
    g = Graph(f"""# Two stages

{GET_SD15}

The first node runs 14 of 24 steps with much noise and hands the latent on with its noise; the second goes on without.
For a refiner, connect its model (and its prompts) to the second node. Its noise is not the first node's over again.""")
    g.checkpoint(SD15)
    g.empty(512)
    g.column()
    common = {"model": g.model, "noise_seed": 1, "steps": 24, "cfg": 7.0, "scheduler": "karras", "positive": g.positive,
              "negative": g.negative, **AS_PRESET}
    first = g.add("ERSDE_KSamplerAdvanced", "First part, to step 14", preset="sde", add_noise="enable",
                  latent_image=g.latent, start_at_step=0, end_at_step=14, return_with_leftover_noise="enable", **common)
    g.column()
    second = g.add("ERSDE_KSamplerAdvanced", "Second part, from step 14", preset="ode", add_noise="disable",
                   latent_image=[first, 0], start_at_step=14, end_at_step=10000, return_with_leftover_noise="disable",
                   **common)
    g.column()
    g.show(second, save="ersde/two_stages")
    return g


def plot():
    g = Graph(f"""# The plot, and a curve of your own

{GET_SD15} Any other model will do.

Left chart: what the preset `sde_5` does with this model and schedule. Right chart: a noise scale through points (*ER-SDE
Noise Scale*, one "lambda g" per line). Connect it to `custom_scale` of a sampler to use it.

The charts need matplotlib: `python -m pip install matplotlib` in ComfyUI's Python.""")
    model = g.add("CheckpointLoaderSimple", ckpt_name=SD15)
    scale = g.add("ERSDE_NoiseScale", function="points", eta=1.0, points="0.03 1\n0.5 1\n3 3\n15 20")
    for title, more in (("The preset sde_5", {}), ("The curve through points", {"custom_scale": [scale, 0]})):
        g.column()
        chart = g.add("ERSDE_Plot", title, model=[model, 0], scheduler="karras", steps=24, denoise=1.0, preset="sde_5",
                      **AS_PRESET, **more)
        g.sizes[g.add("PreviewImage", title, images=[chart, 0])] = [620, 440]
    return g


ALL = {f"ersde_{make.__name__}": make for make in (text_to_image, flow, few_steps, image_to_image, eta, noise_scales,
                                                   two_stages, plot)}

# Runs in the page: load the API graph, place the nodes in columns behind the note, and serialize.
PLACE = """async ([api, columns, titles, sizes, note, name]) => {
    const app = window.app, wait = (ms) => new Promise((done) => setTimeout(done, ms));
    await app.loadApiJson(api, name);
    await wait(300);
    const graph = app.graph, wide = {PreviewImage: [330, 380], SaveImage: [330, 420], CLIPTextEncode: [330, 160],
                                     LoadImage: [300, 340], ERSDE_NoiseScale: [320, 230]};
    const size = (node) => {
        const least = node.computeSize();
        const [w, h] = sizes[node.id] ?? wide[node.type] ?? [Math.max(least[0], 270), least[1]];
        node.setSize([w, Math.max(h, least[1])]);
        return node.size;
    };
    const text = window.LiteGraph.createNode("MarkdownNote");
    graph.add(text);
    text.title = "About this workflow";
    text.widgets[0].value = note;
    text.setSize([380, 420]);
    text.pos = [0, 0];
    let x = 440;
    for (const column of columns) {
        let y = 0, width = 0;
        for (const id of column) {
            const node = graph.getNodeById(id);
            if (titles[id]) node.title = titles[id];
            for (const widget of node.widgets ?? [])
                if (widget.name === "control_after_generate") widget.value = "fixed";
            const [w, h] = size(node);
            node.pos = [x, y];
            y += h + 70;
            width = Math.max(width, w);
        }
        x += width + 80;
    }
    await wait(300);
    app.canvas.ds.fitToBounds?.([-60, -80, x + 60, 900]);
    graph.setDirtyCanvas(true, true);
    await wait(500);
    return graph.serialize();
}"""


def tidy(graph):
    """Without what belongs to the one who made it: ids, the view, the versions of the page."""
    for key in ("id", "revision", *[key for key, value in graph.items() if value is None]):
        graph.pop(key, None)
    graph["extra"] = {}
    for node in graph["nodes"]:
        node["properties"] = {key: value for key, value in node.get("properties", {}).items() if key == "Node name for S&R"}
        node["pos"], node["size"] = [round(v) for v in node["pos"]], [round(v) for v in node["size"]]
        node.pop("widgets_values_named", None)
        for part in (node, *node.get("inputs", ()), *node.get("outputs", ())):
            for key in [key for key, value in part.items() if value is None and key not in ("link", "links")]:
                del part[key]
    graph["nodes"].sort(key=lambda node: node["id"])
    return graph


def open_page(playwright, address, **options):
    """(browser, page) with ComfyUI's canvas ready."""
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1900, "height": 1000}, **options)
    page.goto(address)
    page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types?.ERSDE_KSampler)",
                           timeout=120_000)
    page.wait_for_timeout(1500)
    return browser, page


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    WORKFLOWS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser, page = open_page(playwright, options.address)
        for name, make in ALL.items():
            g = make()
            graph = page.evaluate(PLACE, [g.nodes, g.columns, g.titles, g.sizes, g.note, name])
            (WORKFLOWS / f"{name}.json").write_text(json.dumps(tidy(graph), indent=1, ensure_ascii=False) + "\n",
                                                    encoding="utf-8")
            print("written:", f"workflows/{name}.json")
            if make is text_to_image:
                page.screenshot(path=PICTURE, clip={"x": 270, "y": 130, "width": 1350, "height": 700})
            if options.screenshots:
                options.screenshots.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=options.screenshots / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
