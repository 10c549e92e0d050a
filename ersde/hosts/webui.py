"""The Stable Diffusion WebUIs: AUTOMATIC1111 and its forks Forge, reForge and Forge Neo.

One entry of the sampler list per preset.  The host's modules are imported inside functions only, so that this module
can be read anywhere.
"""
from __future__ import annotations

import sys
from typing import Callable, List, Mapping, Optional

from ..presets import Preset, all_presets
from ..samplers import sample_preset

PREFIX = "ER-SDE "
"""What every name of ours begins with.  Hosts that have a sampler of this family call it `ER SDE`: no hyphen."""

_MARK = "ersde_preset"      # on an entry's constructor: tells our entries from anybody else's, also after a re-import


def sampler_name(preset: Preset) -> str:
    """The preset's name in the WebUI's list, in pictures' infotexts and over the API."""
    return PREFIX + preset.label


def host_noise(model, x) -> Optional[Callable]:
    """A noise sampler on the host's generators, one per image, so that a batch equals its single images.

    None where the host gives none; the library's own noise is used then.
    """
    rng = getattr(getattr(model, "p", None), "rng", None)
    if rng is None:
        return None
    return lambda sigma, sigma_next: rng.next().to(device=x.device, dtype=x.dtype)


def sampler_function(preset: Preset) -> Callable:
    """The preset as the plain k-diffusion function the WebUI calls.

    It has no parameter `eta`: the host would fill it from its slider for ancestral samplers.
    """
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sample_preset(model, x, sigmas, preset, extra_args, callback, disable,
                             noise_sampler=host_noise(model, x))

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
    # The host's setting "eta noise seed delta" changes the generators that our noise comes from: uses_ensd makes it
    # write the setting to the infotext.  No 'scheduler': "Automatic" stays the model's own schedule.
    options = {"uses_ensd": True} if preset.eta > 0 and preset.s_noise > 0 else {}
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
            print(f"ER-SDE: preset {preset.name!r} has the label of another one, {preset.label!r}, and is left out",
                  file=sys.stderr)
        elif name.lower().endswith(tuple(endings)):
            print(f"ER-SDE: preset {preset.name!r} is left out: its label {preset.label!r} ends in the name of a schedule, "
                  "which this WebUI would cut off", file=sys.stderr)
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
            print(f"ER-SDE: {problem}", file=sys.stderr)
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
            print(f"ER-SDE: this WebUI already has a sampler named {entry.name!r}; it is kept, ours is left out",
                  file=sys.stderr)
            continue
        sd_samplers.all_samplers_map[entry.name] = entry
        names.append(entry.name)
    sd_samplers.set_samplers()
    # The host remembers what a name from an infotext stands for, also that it was unknown.
    forget = getattr(getattr(sd_samplers, "get_sampler_and_scheduler", None), "cache_clear", None)
    if forget is not None:
        forget()
    return names
