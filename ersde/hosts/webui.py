"""The Stable Diffusion WebUIs: AUTOMATIC1111 and its forks Forge, reForge and Forge Neo.

One entry of the sampler list per preset, and the settings that change it (`webui_settings`, on the page by `webui_page`).
The host's modules are imported inside functions only, so that this module can be read anywhere.
"""
from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import Callable, ContextManager, Dict, List, Mapping, Optional

import torch

from ..presets import Preset, all_presets
from ..samplers import sample_preset
from . import read_process
from . import webui_settings as settings
from .webui_settings import SETTINGS, sampler_name

_MARK = "ersde_preset"      # on an entry's constructor: tells our entries from anybody else's, also after a re-import
HIDDEN = "ersde_hidden"     # the settings page's list of entries to leave out of the sampler list


def say(text: str) -> None:
    """One line in the host's log."""
    print(f"ER-SDE: {text}", file=sys.stderr)


def option(name: str, default=None):
    """One of the host's settings as it stands; over the API `override_settings` stands in for it."""
    return getattr(getattr(sys.modules.get("modules.shared"), "opts", None), name, default)


def host_noise(model, x) -> Optional[Callable]:
    """A noise sampler on the host's generators, one per image, so that a batch equals its single images.

    None where the host gives none; the library's own noise is used then.
    """
    rng = getattr(getattr(model, "p", None), "rng", None)
    if rng is None:
        return None
    return lambda sigma, sigma_next: rng.next().to(device=x.device, dtype=x.dtype)


def model_watch(model) -> Callable[[], bool]:
    """A function that says whether another model was loaded since it was last asked: the refiner, inside a model call.

    The host wraps the new model anew.  Forge Neo's quick refiner only exchanges the weights, and keeps the name of the file
    that it will go back to.
    """
    common = sys.modules.get("modules.sd_samplers_common")
    state = lambda: (getattr(model, "inner_model", None), getattr(common, "ORIGINAL_CHECKPOINT", None))
    last = [state()]        # the wrapper itself, not its id, which a new one may be given again

    def changed() -> bool:
        now, before = state(), last[0]
        last[0] = now
        return now[0] is not before[0] or now[1] != before[1]

    return changed


def guidance_excess(model, x, extra_args: dict) -> ContextManager[Optional[Callable[[], Optional[torch.Tensor]]]]:
    """For the time of a run, () -> A = D - D_c of the newest call of `model`, for `sample_preset`; None: nothing tells it.

    With D_u and D_c of weight w, the weights of a prompt with AND summed, and a mask's share m of the new picture,

        D_c = D_u + w (mean of the conditions' predictions - D_u),   A = m (D - D_c).

    A call of which the host does not tell both predictions gives None, one without guidance None or 0.

    Args:
        x: a state of the run, for the dtype and the device of A.
        extra_args: what the model is called with; the host exchanges its conditions when a refiner comes.
    """
    callbacks = sys.modules.get("modules.script_callbacks")
    wanted = ("on_cfg_denoiser", "on_cfg_denoised", "on_cfg_after_cfg", "remove_callbacks_for_function")
    if not hasattr(model, "step") or not all(hasattr(callbacks, name) for name in wanted):
        return nullcontext()
    inner = getattr(getattr(model, "inner_model", None), "inner_model", None)
    return (_excess_of_hook if hasattr(inner, "forge_objects") else _excess_of_rows)(callbacks, model, x, extra_args)


@contextmanager
def _excess_of_rows(callbacks, model, x, extra_args):
    """AUTOMATIC1111: its callbacks are shown all predictions of a call, then the result.

    The rows are those of the conditions, image after image, then D_u of each image, or where the host saves that, the
    image's first condition once more.  The result is blended under a mask, by an extension's rule perhaps, so that D is
    taken from the host's own formula there, D_u + s (D_c - D_u).  An InstructPix2Pix model, which has two guidances, has
    more rows.  Source: modules/sd_samplers_cfg_denoiser.py.
    """
    newest = {}

    def keep_rows(params):
        newest.update(step=model.step, rows=params.x, result=None)

    def keep_result(params):
        newest["result"] = params       # itself: the callbacks after this one may exchange its x

    def excess():
        images = getattr(extra_args.get("cond"), "batch", None)
        if images is None or newest.get("result") is None or newest.get("step") != model.step - 1:
            return None
        rows, weights = newest["rows"], [[part.weight for part in parts] for parts in images]
        if len(rows) != len(images) + sum(map(len, weights)):
            return None
        plain, at = rows[-len(images):], 0
        conditional, first = plain.clone(), []
        for i, parts in enumerate(weights):
            first.append(at)
            for weight in parts:
                conditional[i] += (rows[at] - plain[i]) * weight
                at += 1
        if getattr(model, "mask", None) is None:
            return (newest["result"].x - conditional).to(x)
        if at > len(images) and torch.equal(plain, rows[first]):
            return None         # without D_u, which more than one condition would seem to differ from
        return ((conditional - plain) * (extra_args["cond_scale"] - 1.0) * model.nmask).to(x)

    try:
        callbacks.on_cfg_denoised(keep_rows)
        callbacks.on_cfg_after_cfg(keep_result)
        yield excess
    finally:
        for keep in (keep_rows, keep_result):
            callbacks.remove_callbacks_for_function(keep)
        newest.clear()


@contextmanager
def _excess_of_hook(callbacks, model, x, extra_args):
    """Forge, reForge, Forge Neo: a post-cfg function of the network's patcher is given D, D_u and the conditions' mean.

    A refiner has a patcher of its own, so that each call looks for it.  Source: backend/sampling/sampling_function.py,
    in reForge ldm_patched/modules/samplers.py.
    """
    name, newest, hooked = "sampler_post_cfg_function", {}, []

    def keep(args):
        parts = args["cond"]        # a tensor in the first versions of Forge, whose mean has the weights in it
        newest.update(step=model.step, guided=args["denoised"], mean=args["cond_denoised"], plain=args["uncond_denoised"],
                      weight=sum(part.get("strength", 1.0) for part in parts) if isinstance(parts, list) else 1.0)
        return args["denoised"]

    def hook(_=None):
        unet = model.inner_model.inner_model.forge_objects.unet
        if keep not in unet.model_options.get(name, ()):
            unet.set_model_sampler_post_cfg_function(keep)
            hooked.append(unet.model_options)       # not the patcher, which would hold on to a network not in use any more

    def excess():
        if newest.get("plain") is None or newest["step"] != model.step - 1:
            return None
        plain = newest["plain"]
        out = newest["guided"] - plain - (newest["mean"] - plain) * newest["weight"]
        return (out if getattr(model, "mask", None) is None else out * model.nmask).to(x)

    try:
        callbacks.on_cfg_denoiser(hook)
        yield excess
    finally:
        callbacks.remove_callbacks_for_function(hook)
        for options in hooked:
            options[name] = [function for function in options.get(name, ()) if function is not keep]
            if not options[name]:
                del options[name]
        newest.clear()


def page_defaults() -> Dict[str, object]:
    """The settings page's values by field."""
    return {setting.field: option(setting.option) for setting in SETTINGS}


def refusal(text) -> Exception:
    """What the host's API answers with status 422 and this sentence."""
    from fastapi import HTTPException
    return HTTPException(status_code=422, detail=f"ER-SDE: {text}")


def check_schedule(p, sigmas, process: str) -> None:
    """A flow model's schedule lies within 0 to 1.  Forge Neo's Automatic and Uniform do not for some (Anima, Z-Image, ...).

    Raises:
        HTTPException: over the API, 422; ValueError: on the page.  Either names the schedule and a way out.
    """
    top = float(sigmas[0]) if len(sigmas) else 0.0
    if process == "flow" and top > 1.0 + 1e-6:      # a shift in float32 can leave 1 a rounding higher
        name = getattr(p, "hr_scheduler" if getattr(p, "is_hr_pass", False) else "scheduler", None) or "Automatic"
        text = (f"the schedule {name!r} of this WebUI begins at sigma {top:.6g}, and a flow model has none above 1; choose "
                "another schedule, Simple for example")
        raise refusal(text) if getattr(p, "is_api", False) else ValueError(text)


def settings_of(p, sampler: Preset, presets: Mapping[str, Preset]) -> Preset:
    """The settings of a run of `p` with the sampler of the preset `sampler`.

    A setting that is not allowed is refused over the API.  A person's run goes on with the sampler's preset, and one line
    under the picture and in the log says so.

    Raises:
        HTTPException: over the API, 422, in one sentence.
    """
    places = {"settings page or override_settings": page_defaults(),
              "ER-SDE accordion or alwayson_scripts": getattr(p, "ersde_page", {}),
              "X/Y/Z plot": getattr(p, "ersde_axes", {})}
    try:
        return settings.apply(sampler, places, presets)
    except (TypeError, ValueError) as error:
        if getattr(p, "is_api", False):
            raise refusal(error) from None
        text = f"{error}; made with the sampler's preset {sampler.label!r}"
        if getattr(p, "ersde_said", None) != text:      # once for a picture, not for each of its passes
            p.ersde_said = text
            say(text)
            if hasattr(p, "comment"):
                p.comment(f"ER-SDE: {text}")
        return sampler


def sampler_function(preset: Preset) -> Callable:
    """The preset as the plain k-diffusion function the WebUI calls.

    It has no parameter `eta`: the host would fill it from its slider for ancestral samplers.
    """
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        p, process, used = getattr(model, "p", None), read_process(model), preset
        if p is not None:
            check_schedule(p, sigmas, process)
            presets, _ = all_presets()
            used = settings_of(p, preset, presets)
            # Before the run, so that a picture that was interrupted has it too; the hires pass adds what it knows.
            p.extra_generation_params.update(settings.infotext(preset, used, presets, process))
            delta = option("eta_noise_seed_delta", 0)
            if delta and settings.is_noisy(used):
                # The host's setting changes the generators that our noise comes from.  Its own way to write it
                # ('uses_ensd') knows nothing of what the settings made of the preset.
                p.extra_generation_params[settings.DELTA_LABEL] = delta
        extra_args = {} if extra_args is None else extra_args
        # Only the long steps of this method ask for it.
        with guidance_excess(model, x, extra_args) if used.method == "exact" else nullcontext() as excess:
            return sample_preset(model, x, sigmas, used, extra_args, callback, disable, noise_sampler=host_noise(model, x),
                                 process=process, fresh=model_watch(model), excess=excess)

    sample.__name__ = sample.__qualname__ = f"sample_er_sde_{preset.name}"
    return sample


def sampler_entry(preset: Preset):
    """The host's SamplerData for a preset."""
    from modules.sd_samplers_common import SamplerData
    from modules.sd_samplers_kdiffusion import KDiffusionSampler

    function = sampler_function(preset)

    def constructor(model):
        return KDiffusionSampler(function, model)

    setattr(constructor, _MARK, preset.name)
    # None of the built-in ones has a schedule: "Automatic" stays the model's own, which a flow model needs.
    options = {"scheduler": preset.scheduler} if preset.scheduler else {}
    return SamplerData(sampler_name(preset), constructor, [f"er_sde_{preset.name}"], options)


def _usable(presets: Mapping[str, Preset]) -> List[Preset]:
    """The presets whose names this host can tell apart; one line in the log for each that is left out."""
    try:
        from modules import sd_schedulers
        endings = [" " + schedule.label.lower() for schedule in sd_schedulers.schedulers]
    except ImportError:             # a version before schedules were a list of their own
        endings = []
    good, seen = [], set()
    for preset in presets.values():
        name = sampler_name(preset)
        if name in seen:
            say(f"preset {preset.name!r} has the label of another one, {preset.label!r}, and is left out")
        elif name.lower().endswith(tuple(endings)):
            say(f"preset {preset.name!r} is left out: its label {preset.label!r} ends in the name of a schedule, which this "
                "WebUI would cut off")
        else:
            seen.add(name)
            good.append(preset)
    return good


def register(presets: Optional[Mapping[str, Preset]] = None) -> List[str]:
    """Put one entry per preset in the host's sampler list and return the names that are there.

    `presets` are the built-in ones and the person's own when None.

    An entry of ours is replaced where it stands ("Reload UI" runs the script again), a new one goes to the end, and
    an entry of the same name that is not ours is left alone and reported.
    """
    from modules import sd_samplers

    if presets is None:
        presets, problems = all_presets()
        for problem in problems:
            say(problem)
    entries = [sampler_entry(preset) for preset in _usable(presets)]    # all of them, before the list is touched
    places = {entry.name: i for i, entry in enumerate(sd_samplers.all_samplers)}
    names = []
    for entry in entries:
        place = places.get(entry.name)
        if place is None:
            places[entry.name] = len(sd_samplers.all_samplers)
            sd_samplers.all_samplers.append(entry)
        elif hasattr(getattr(sd_samplers.all_samplers[place], "constructor", None), _MARK):
            sd_samplers.all_samplers[place] = entry
        else:
            say(f"this WebUI already has a sampler named {entry.name!r}; it is kept, ours is left out")
            continue
        sd_samplers.all_samplers_map[entry.name] = entry
        names.append(entry.name)
    sd_samplers.set_samplers()
    _hide(sd_samplers, names)
    # The host remembers what a name from an infotext stands for, also that it was unknown.
    forget = getattr(getattr(sd_samplers, "get_sampler_and_scheduler", None), "cache_clear", None)
    if forget is not None:
        forget()
    return names


def _hide(sd_samplers, names: List[str]) -> None:
    """Leave the entries that the settings page names out of the page's lists.

    They stay known by name, to the API and to a pasted infotext, as the host's own hidden samplers do.
    """
    chosen = option(HIDDEN)
    hidden = {name for name in names if isinstance(chosen, (list, tuple)) and name in chosen}
    if hidden:
        sd_samplers.samplers_hidden = set(sd_samplers.samplers_hidden) | hidden


def start():
    """Everything at once, as the WebUI's script wants it: the samplers, the settings page, the axes; returns the accordion.

    The accordion is a class for the host to collect, or None.  A part that fails is one line in the log, and the others
    are there all the same.
    """
    from . import webui_page

    made = {}
    for what, part in (("settings page", webui_page.add_settings), ("samplers", register),
                       ("axes, no pasting", webui_page.add_callbacks), ("accordion", webui_page.script_class)):
        try:
            made[what] = part()
        except Exception as error:      # whatever it is, the WebUI must start
            say(f"no {what}: {type(error).__name__}: {error}")
    return made.get("accordion")
