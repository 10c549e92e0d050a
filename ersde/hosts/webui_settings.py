"""The WebUI's settings without the WebUI: what a value may be, how they change a preset, what stands in the infotext.

A setting is left "as the sampler's preset", or changes one field of it.  It can come from three places, the later ones over
the earlier: the settings page (or `override_settings`), the accordion (or `alwayson_scripts`), an axis of a plot.  The
chosen preset counts first, whichever place it comes from, and the other settings change that.
"""
from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Callable, Dict, Iterable, Mapping, Optional, Tuple

from ..errors import check_bool, check_choice, check_int, check_real, shown
from ..noise_scale import NOISE_SCALES
from ..presets import FIELDS, PRESETS, TEXTS, Preset
from ..weights import MAX_ORDER

AS_PRESET = "as the sampler's preset"
"""The text of a setting that changes nothing; "" and None mean the same."""

PREFIX = "ER-SDE "
"""What every name of ours begins with: samplers, infotext labels, axes.  Hosts that have a sampler of this family call it
`ER SDE`: no hyphen."""

MOST = 10.0
"""The most that eta and s_noise may be, as in the ComfyUI nodes: more is a slip of the hand, or of another version."""

PROCESS_LABEL = PREFIX + "process"
OWN_LABEL = PREFIX + "own preset"
DELTA_LABEL = "ENSD"
"""The host's own label of its setting "eta noise seed delta"."""


def sampler_name(preset: Preset) -> str:
    """The preset's name in the WebUI's list, in pictures' infotexts and over the API."""
    return PREFIX + preset.label


def _read_preset(name: str, value, presets: Mapping[str, Preset]) -> str:
    by_label = {preset.label: key for key, preset in reversed(presets.items())}
    known = not isinstance(value, str) or value in presets
    return check_choice(name, value if known else by_label.get(value, value), presets)


def _number(name: str, value):
    """A text as the number it is, anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {shown(value)}") from None


def _real(high: float) -> Callable:
    return lambda name, value, presets: check_real(name, _number(name, value), 0.0, high)


def _read_order(name: str, value, presets) -> int:
    value = _number(name, value)
    whole = isinstance(value, Real) and not isinstance(value, bool) and value == value // 1
    return check_int(name, int(value) if whole else value, 1, MAX_ORDER)


def _read_corrector(name: str, value, presets) -> bool:
    words = {"on": True, "true": True, "off": False, "false": False}
    if isinstance(value, str):
        return words[check_choice(name, value.lower(), words)]
    return check_bool(name, value)


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        field: its key over the API, and the preset's field it changes ("preset": which preset).
        name: what a person reads; `label` is that in an infotext.
        help: a few words.
        read: (name, value, presets) -> the checked value; TypeError or ValueError.
        choices: presets -> the texts to choose from; None: a text to type.
        axis: the type of a plot's axis.
    """

    field: str
    name: str
    help: str
    read: Callable
    choices: Optional[Callable] = None
    axis: type = float

    @property
    def label(self) -> str:
        return PREFIX + self.name

    @property
    def option(self) -> str:
        """Its key on the settings page and in `override_settings`."""
        return "ersde_" + self.field

    @property
    def unset(self) -> str:
        """The control's text for "as the sampler's preset"."""
        return AS_PRESET if self.choices else ""


SETTINGS: Tuple[Setting, ...] = (
    Setting("preset", "preset", "settings of another preset than the sampler's", _read_preset,
            lambda presets: list(presets), str),
    Setting("noise_scale", "noise scale", "how much noise, and when: ode none, sde_3 most",
            lambda name, value, presets: check_choice(name, value, NOISE_SCALES), lambda presets: list(NOISE_SCALES), str),
    Setting("eta", "eta", "0: no noise (ODE), 1: as published, more: more noise", _real(MOST)),
    Setting("s_noise", "s_noise", "factor of the noise; 1 is right in theory", _real(MOST)),
    Setting("order", "order", "evaluations to interpolate; long steps use fewer", _read_order,
            lambda presets: [str(order) for order in range(1, MAX_ORDER + 1)], int),
    Setting("corrector", "corrector", "each evaluation also corrects the step before", _read_corrector,
            lambda presets: ["on", "off"], str),
    Setting("start", "noise start", "no noise before this part of the schedule", _real(1.0)),
    Setting("end", "noise end", "none after it; 0: all noise, 1: the picture", _real(1.0)),
)
"""All settings in their order on the page and in `alwayson_scripts`."""

_BY_FIELD = {setting.field: setting for setting in SETTINGS}


def text_of(value) -> str:
    """A value as the controls and the infotext have it; reading it gives the value again."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def read(field: str, value, presets: Mapping[str, Preset] = PRESETS):
    """A setting's checked value, None where it is left as the preset's.

    Raises:
        TypeError, ValueError: an unknown setting, or a value that is not allowed; names it and what is allowed.
    """
    setting = _BY_FIELD[check_choice("an ER-SDE setting", field, _BY_FIELD)]
    if value is None or isinstance(value, str) and value.strip() in ("", AS_PRESET):
        return None
    return setting.read(setting.name, value.strip() if isinstance(value, str) else value, presets)


def from_arguments(arguments: Iterable) -> Dict[str, object]:
    """The script's arguments as {field: value}: one for each setting in their order, or a dict in the first place, which
    goes before what comes behind it.

    Nothing is checked yet.
    """
    given = dict(zip(_BY_FIELD, arguments))
    if isinstance(given.get("preset"), dict):
        given.update(given.pop("preset"))
    return given


def apply(sampler: Preset, places: Mapping[str, Mapping[str, object]], presets: Mapping[str, Preset]) -> Preset:
    """The settings that a sampler of the preset `sampler` runs with.

    Args:
        places: the name of a place -> its settings as they were given, by field, later places over earlier ones.

    Raises:
        TypeError, ValueError: some setting is not allowed; names it, the value, what is allowed and the place.
    """
    changes: Dict[str, object] = {}
    for place, given in places.items():
        for field, value in given.items():
            try:
                value = read(field, value, presets)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error} ({place})") from None
            if value is not None:
                changes[field] = value
    name = changes.pop("preset", sampler.name)
    # The sampler's own as it is listed, though the file of presets may have changed since.
    return (sampler if name == sampler.name else presets[name]).replace(**changes)


def is_noisy(preset: Preset) -> bool:
    """Whether its runs draw noise."""
    return preset.eta > 0 and preset.s_noise > 0 and preset.noise_scale != "ode"


def infotext(sampler: Preset, used: Preset, presets: Mapping[str, Preset], process: str = "ve") -> Dict[str, str]:
    """What a picture's infotext says beside the sampler's name: label -> text, only what its name does not tell.

    A person's own preset is written out, since it means nothing elsewhere and may be changed.
    """
    out = {} if used.name == sampler.name else {_BY_FIELD["preset"].label: used.name}
    base = sampler if used.name == sampler.name else presets[used.name]
    for setting in SETTINGS[1:]:
        value = getattr(used, setting.field)
        if value != getattr(base, setting.field):
            out[setting.label] = text_of(value)
    if base.name not in PRESETS:
        plain = Preset(base.name)
        fields = [f for f in FIELDS if f not in TEXTS and getattr(base, f) != getattr(plain, f)]
        out[OWN_LABEL] = ", ".join(f"{f} {text_of(getattr(base, f))}" for f in fields) or "all defaults"
    if process != "ve":
        out[PROCESS_LABEL] = process
    return out


LABELS: Tuple[str, ...] = (*(setting.label for setting in SETTINGS), OWN_LABEL, PROCESS_LABEL, DELTA_LABEL)
"""Every label that an infotext can have from us."""


def pasted(params: Mapping[str, object], defaults: Mapping[str, object], presets: Mapping[str, Preset]) -> Dict[str, str]:
    """The controls' texts, by label, for a picture with the infotext `params`.

    What its infotext has is taken as it stands, right or wrong.  What it lacks was as the preset, which must be said where
    the settings page has another default.

    Args:
        params: label -> text.
        defaults: the settings page's, by field.
    """
    by_name = {sampler_name(preset): preset for preset in reversed(presets.values())}
    sampler = by_name.get(params.get("Sampler")) or by_name.get(params.get("Hires sampler"))
    base = presets.get(params.get(_BY_FIELD["preset"].label), sampler)
    out = {}
    for setting in SETTINGS:
        text = params.get(setting.label)
        if text is None:
            text = setting.unset
            if sampler is not None and defaults.get(setting.field) not in (None, "", AS_PRESET):
                text = sampler.name if setting.field == "preset" else text_of(getattr(base, setting.field))
        out[setting.label] = str(text)
    return out
