"""The ComfyUI nodes: inputs and tooltips.  What they do is in `ersde.hosts.comfyui`.

Saved workflows hold ids and input names, and the widgets' values by position: none is ever renamed or moved, and what is new
goes to the end and is optional, so that a workflow or an API file without it still runs.
"""
from comfy_api.latest import ComfyExtension, io

if __package__:
    from .ersde import NOISE_SCALES, PRESETS
    from .ersde.hosts import comfyui
    from .ersde.weights import METHODS
else:                                   # imported by itself from the folder, outside ComfyUI
    from ersde import NOISE_SCALES, PRESETS
    from ersde.hosts import comfyui
    from ersde.weights import METHODS

PresetValue = io.Custom("ERSDE_PRESET")
ScaleValue = io.Custom("ERSDE_NOISE_SCALE")

ALIASES = ["er_sde", "ersde", "er sde", "extended reverse-time SDE"]
SEED_MAX = 2 ** 64 - 1


def _schema(node_id, display_name, category, description, inputs, outputs, aliases=(), **more):
    """The node's schema; older versions have no search aliases."""
    if "search_aliases" in io.Schema.__dataclass_fields__:
        more["search_aliases"] = [*ALIASES, *aliases]
    return io.Schema(node_id=node_id, display_name=display_name, category=category, description=description, inputs=inputs,
                     outputs=outputs, **more)


def _preset_input():
    """The list of presets, built in and the person's own."""
    # One short line each: the page cuts a tooltip that is higher than its window.
    lines = "\n".join(f"{name}: {preset.description.partition(':')[0].lower()}" for name, preset in PRESETS.items())
    return io.Combo.Input("preset", options=comfyui.preset_names(), default="sde_5", tooltip=(
        "The settings to begin with; the inputs below change single ones of them.\n" + lines))


def _first_inputs():
    """What may differ from the preset: the inputs of the first version, which are required."""
    return [
        io.Combo.Input("noise_scale", options=[comfyui.AS_PRESET, *NOISE_SCALES], default=comfyui.AS_PRESET, tooltip=(
            "How much noise is added, and when. Rising: ode adds none, sde_1 hardly any, sde_2 some, sde more, sde_3 most, "
            "evenly over the run; sde_5 adds a little and mostly early, sde_4 much and late. More noise wants more steps. "
            "\"as preset\": the preset's. With eta 0 it makes no difference.")),
        io.Float.Input("eta", default=-1.0, min=-1.0, max=10.0, step=0.05, round=0.001, tooltip=(
            "Raise it for more fresh noise in every step: more varied detail, and more steps needed. 0 is the noise-free "
            "ODE, 1 the noise scale as published. Flow models: with any eta above 0 all noise scales but sde_1 and sde_4 "
            "replace the first noise at once. Below 0, such as -1: as the preset has it.")),
        io.Float.Input("s_noise", default=-1.0, min=-1.0, max=10.0, step=0.01, round=0.001, tooltip=(
            "Raise it for stronger noise than the method calls for: more grain and texture, soon a dirty picture; under 1 "
            "the picture gets smoother. 1 is right in theory. Below 0, such as -1: as the preset has it.")),
        io.Int.Input("order", default=0, min=0, max=5, tooltip=(
            "Raise it to let each step look back on more of the earlier ones: more accurate at many steps, a little less "
            "steady with high cfg. At few steps it hardly counts above 2: long steps go by the newest two evaluations. It "
            "costs no time. 3 at most with the methods paper and comfyui. 0: as the preset has it.")),
    ]


def _later_inputs(for_run=True):
    """What came later, optional; without what only a run has where there is none."""
    settings = [
        io.Combo.Input("corrector", options=[comfyui.AS_PRESET, *comfyui.ON_OFF], default=comfyui.AS_PRESET, optional=True,
                       tooltip=("Whether each evaluation of the model also corrects the step that led to it, at no cost: on "
                                "is more accurate. Only the method exact has it.")),
        io.Combo.Input("method", options=[comfyui.AS_PRESET, *METHODS], default=comfyui.AS_PRESET, optional=True, tooltip=(
            "exact: this pack's solver. paper: the published formulas with exact integrals. comfyui: ComfyUI's own er_sde, "
            "with its noise, to make a shared picture again.")),
        io.Float.Input("start_percent", default=-1.0, min=-1.0, max=1.0, step=0.01, round=0.001, optional=True, tooltip=(
            "Raise it to begin adding noise later, as a part of the model's whole schedule: the composition settles "
            "without noise. 0: from the beginning. Below 0: as the preset has it.")),
        io.Float.Input("end_percent", default=-1.0, min=-1.0, max=1.0, step=0.01, round=0.001, optional=True, tooltip=(
            "Raise it to go on adding noise for longer; lower it for clean flat areas and lines at the end. 1: to the end. "
            "Below 0: as the preset has it.")),
    ]
    run = [
        io.Combo.Input("noise", options=list(comfyui.NOISE_NAMES), default=comfyui.AUTO, optional=True, tooltip=(
            "Where the steps' noise comes from. auto: cpu, and comfyui with the method comfyui.\n"
            + "".join(f"{name}: {text}\n" for name, text in comfyui.NOISES.items())
            + "comfyui: ComfyUI's own generator, one for the whole batch")),
        io.Int.Input("step_noise_seed", default=-1, min=-1, max=SEED_MAX, optional=True, tooltip=(
            "Any number from 0 gives other noise in the steps with the same first noise: variations of one picture (of "
            "flow models other pictures, where the steps replace the first noise: see eta). -1: the run's own seed.")),
        io.Boolean.Input("cfg_pp", default=False, optional=True, tooltip=(
            "CFG++: takes the noise direction from the prediction for the negative prompt, for natural colours. Set cfg to "
            "0.6 to 2 with it: it guides in full in every step, so more steps want less.")),
    ] if for_run else []
    sockets = [
        PresetValue.Input("custom_preset", optional=True, tooltip="A preset in place of the one chosen by name."),
        ScaleValue.Input("custom_scale", optional=True, tooltip=(
            "A noise scale with its eta, in place of the preset's; the input eta still changes its eta.")),
    ]
    return settings + run + sockets


def _run_inputs(advanced):
    """The host's KSampler inputs, the preset where it has the sampler's name."""
    seed = "noise_seed" if advanced else "seed"
    add_noise = [io.Combo.Input("add_noise", options=["enable", "disable"], default="enable", tooltip=(
        "enable: noise is added to the latent first. disable: the latent comes with its noise, from an earlier part of the "
        "run."))]
    steps = [
        io.Int.Input("start_at_step", default=0, min=0, max=10000, tooltip=(
            "Raise it to leave out the first steps: an earlier sampler made them, or the latent is to be kept more.")),
        io.Int.Input("end_at_step", default=10000, min=0, max=10000, tooltip=(
            "Raise it to run more of the schedule; lower it to stop early, for another sampler or model to go on.")),
        io.Combo.Input("return_with_leftover_noise", options=["disable", "enable"], default="disable", tooltip=(
            "enable: a run that stops early leaves its noise in, for the next sampler. disable: it is removed.")),
    ]
    denoise = io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=(
        "Raise it to keep less of the latent it starts from; 1 keeps nothing."))
    return [
        io.Model.Input("model", tooltip="The model that removes the noise."),
        *(add_noise if advanced else []),
        io.Int.Input(seed, default=0, min=0, max=SEED_MAX, control_after_generate=True, tooltip=(
            "Any other number gives another picture; the same number the same picture again. It decides the first noise and "
            "the noise of every step.")),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=(
            "Raise it for a more accurate result, in proportion to the time. The more noise a preset adds, the more steps "
            "it wants.")),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=(
            "Raise it to follow the prompt more closely; too high burns colours and contrast. At 1 the negative prompt has "
            "no effect.")),
        _preset_input(),
        io.Combo.Input("scheduler", options=comfyui.scheduler_names(), tooltip=(
            "How the noise levels are spread over the steps.")),
        io.Conditioning.Input("positive", tooltip="What the picture should show."),
        io.Conditioning.Input("negative", tooltip="What the picture should not show."),
        io.Latent.Input("latent_image", tooltip="The latent to start from: an empty one, or a picture's."),
        *(steps if advanced else [denoise]),
        *_first_inputs(),
        *_later_inputs(),
    ]


class _Node(io.ComfyNode):
    """A node that names a preset: it runs again when the person's own preset of that name was changed."""

    @classmethod
    def fingerprint_inputs(cls, preset=None, **inputs):
        return comfyui.preset_state(preset)


class Sampler(_Node):
    """ER-SDE as a SAMPLER, for SamplerCustom and SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "ERSDE_Sampler", "ER-SDE Sampler", "sampling/custom_sampling/samplers",
            "The ER-SDE sampler, for a custom sampling node. Choose a preset; change single settings of it where you want "
            "to. Works on noise-prediction and on flow models.",
            [_preset_input(), *_first_inputs(), *_later_inputs()],
            [io.Sampler.Output(tooltip="The sampler, to be connected to a custom sampling node.")])

    @classmethod
    def execute(cls, **inputs):
        return io.NodeOutput(comfyui.build_sampler(comfyui.make_settings(**inputs)))


class KSampler(_Node):
    """The host's KSampler with ER-SDE and its settings in one node."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "ERSDE_KSampler", "KSampler (ER-SDE)", "sampling",
            "A KSampler that samples with ER-SDE. Choose a preset; change single settings of it where you want to. Works on "
            "noise-prediction and on flow models.",
            _run_inputs(advanced=False), [io.Latent.Output(tooltip="The denoised latent.")], ["ksampler"])

    @classmethod
    def execute(cls, model, seed, steps, cfg, scheduler, positive, negative, latent_image, denoise, **settings):
        return io.NodeOutput(comfyui.sample_latent(
            comfyui.make_settings(**settings), model, seed, steps, cfg, scheduler, positive, negative, latent_image,
            denoise))


class KSamplerAdvanced(_Node):
    """The host's KSampler (Advanced) with ER-SDE: a part of a run, with or without the noise at its ends."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "ERSDE_KSamplerAdvanced", "KSampler Advanced (ER-SDE)", "sampling",
            "A KSampler (Advanced) that samples with ER-SDE: run a part of the schedule and hand the latent on with its "
            "noise, to a second sampler or a refiner. The second part's noise differs from the first's.",
            _run_inputs(advanced=True), [io.Latent.Output(tooltip="The latent, with its noise where that was asked for.")],
            ["ksampler advanced", "refiner"])

    @classmethod
    def execute(cls, model, add_noise, noise_seed, steps, cfg, scheduler, positive, negative, latent_image, start_at_step,
                end_at_step, return_with_leftover_noise, **settings):
        return io.NodeOutput(comfyui.sample_latent(
            comfyui.make_settings(**settings), model, noise_seed, steps, cfg, scheduler, positive, negative, latent_image,
            add_noise=add_noise == "enable", start_step=start_at_step, end_step=end_at_step,
            leftover_noise=return_with_leftover_noise == "enable"))


class NoiseScale(io.ComfyNode):
    """A noise scale function with its eta, or a curve through points."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "ERSDE_NoiseScale", "ER-SDE Noise Scale", "sampling/custom_sampling/ER-SDE",
            "A noise scale function with its eta, or a curve of your own through points, for the input custom_scale of the "
            "samplers, the plot and the preset. A curve must not fall; a steeper one adds more noise.",
            [io.Combo.Input("function", options=[*NOISE_SCALES, comfyui.POINTS], default="sde_5", tooltip=(
                "How much noise is added, and when; \"points\": the curve below. Rising: ode, sde_1, sde_2, sde, sde_3 over "
                "the whole run; sde_5 mostly early, sde_4 mostly late.")),
             io.Float.Input("eta", default=1.0, min=0.0, max=10.0, step=0.05, round=0.001, tooltip=(
                 "Raise it for more fresh noise in every step. 0 is the noise-free ODE, 1 the function as it is, 2 twice as "
                 "steep.")),
             io.String.Input("points", multiline=True, default="0.03 1\n0.5 1.2\n3 3\n15 20", tooltip=(
                 "For \"points\": one per line, lambda and g, as in 0.5 1.2. lambda = sigma / alpha is the noise level "
                 "(sigma itself for SD and SDXL, sigma / (1 - sigma) for flow models), and only ratios of g matter: where g "
                 "rises steeply much noise is added, where it is flat none."))],
            [ScaleValue.Output(display_name="noise_scale", tooltip="For the input custom_scale.")],
            ["noise schedule", "curve"])

    @classmethod
    def execute(cls, function, eta, points):
        return io.NodeOutput(comfyui.make_scale(function, eta, points))


class Plot(_Node):
    """The chart of what a run would do."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "ERSDE_Plot", "ER-SDE Plot", "sampling/custom_sampling/ER-SDE",
            "Draws what a run with these settings does: the noise scale, the noise that each step adds, the weights of the "
            "model's evaluations and the order of each step. It samples nothing. Needs matplotlib.",
            [io.Model.Input("model", tooltip="The model whose schedule is drawn."),
             io.Combo.Input("scheduler", options=comfyui.scheduler_names(), tooltip=(
                 "How the noise levels are spread over the steps.")),
             io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Raise it to see a longer run."),
             io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=(
                 "Raise it to see more of the schedule; 1 is all of it.")),
             _preset_input(), *_first_inputs(), *_later_inputs(for_run=False),
             io.Sigmas.Input("sigmas", optional=True, tooltip="A schedule in place of scheduler, steps and denoise.")],
            [io.Image.Output(tooltip="The chart.")], ["chart", "graph", "noise schedule"])

    @classmethod
    def execute(cls, model, scheduler, steps, denoise, sigmas=None, **settings):
        return io.NodeOutput(comfyui.plot(comfyui.make_settings(**settings), model, scheduler, steps, denoise, sigmas))


class Preset(_Node):
    """A preset by name as a value, or the settings that the workflow carries."""

    @classmethod
    def define_schema(cls):
        names = io.Combo.Input("preset", options=comfyui.preset_names(), default="sde_5", tooltip=(
            "The preset's name. When you choose one of your own, its settings are copied below, so that the workflow works "
            "for others too."))
        names.extra_dict = {"ersde_carried": comfyui.carried_texts()}       # what the page copies
        return _schema(
            "ERSDE_Preset", "ER-SDE Preset", "sampling/custom_sampling/ER-SDE",
            "A preset for the input custom_preset of the samplers. Its settings travel with the workflow: whoever opens it "
            "gets the same, with or without a preset of that name.",
            [names, io.String.Input("settings", multiline=True, default="", optional=True, tooltip=(
                "The preset's settings as JSON, as in {\"noise_scale\": \"sde\", \"eta\": 0.3}; they win over what this "
                "machine has under the name. Empty: the preset of that name on this machine."))],
            [PresetValue.Output(display_name="preset", tooltip="For the input custom_preset.")], ["load preset"])

    @classmethod
    def validate_inputs(cls, preset=None):
        return True             # a name that this machine does not have is no error while its settings are carried

    @classmethod
    def execute(cls, preset, settings=""):
        return io.NodeOutput(comfyui.load_preset(preset, settings))


class PresetSave(_Node):
    """Adds a preset to the person's own."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "ERSDE_PresetSave", "ER-SDE Preset Save", "sampling/custom_sampling/ER-SDE",
            "Saves settings under a name, in the pack's file of your own presets (user_presets.json). After it has run, "
            "press R on the canvas to see the name in the lists.",
            [io.String.Input("name", default="my preset", tooltip=(
                "Letters, digits, spaces and any of _ . ( ) + -, up to 64. The built-in names are taken.")),
             _preset_input(), *_first_inputs(), *_later_inputs(for_run=False),
             io.Boolean.Input("overwrite", default=False, optional=True, tooltip=(
                 "Whether a preset of that name with other settings is replaced; else it is an error.")),
             io.String.Input("description", default="", optional=True, tooltip="A sentence on what it is for.")],
            [PresetValue.Output(display_name="preset", tooltip="The preset that was saved.")],
            ["save preset"], is_output_node=True)

    @classmethod
    def execute(cls, name, overwrite=False, description="", **settings):
        return io.NodeOutput(comfyui.store_preset(name, comfyui.make_settings(**settings), overwrite, description))


NODES = [Sampler, KSampler, KSamplerAdvanced, NoiseScale, Plot, Preset, PresetSave]


class Extension(ComfyExtension):
    """The pack as the host loads it."""

    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    """What the host asks for its extension."""
    return Extension()
