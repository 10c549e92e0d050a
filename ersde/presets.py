"""Presets: named settings that mean the same in every host, built in or from a user's JSON file."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import threading
import unicodedata
from dataclasses import dataclass
from types import MappingProxyType
from typing import Dict, List, Mapping, Tuple

from .errors import check_bool, check_choice, check_eta, check_int, check_real, shown
from .noise_scale import NOISE_SCALES
from .weights import METHODS

_FILE_LIMIT = 1 << 20       # bytes; a preset is a few hundred
TEXTS: Mapping[str, int] = MappingProxyType({"label": 100, "description": 1000, "scheduler": 64})
"""The fields that say nothing of the sampling itself, and the most letters of each."""
_SAVING = threading.Lock()      # a save reads the file and writes it again: one at a time in a process
_NAME = re.compile(r"[^\W_][\w .()+-]{0,63}")


@dataclass(frozen=True)
class Preset:
    """Immutable settings of the sampler; every field is checked when it is made.

    Attributes:
        name: its key; built-in names are identifiers (the function is `sample_er_sde_<name>`).
        noise_scale: a name of `NOISE_SCALES`.
        eta: exponent of g, 0 (the ODE) and up.
        s_noise: factor of the noise's standard deviation, 0 and up.
        order: how many evaluations are interpolated, 1 to 5 ("paper" and "comfyui": 1 to 3).
        corrector: whether each evaluation also corrects the step before it ("exact" only).
        method: "exact", "paper" or "comfyui".
        start, end: the stochastic window as a part of the whole schedule of the model, 0 (pure noise) to 1 (the picture);
            outside it eta is 0.
        label: what a person reads in a list.
        description: one sentence, "what it is for: why"; the first half alone stands in short lists.
        scheduler: the schedule, by the host's name for it, that a WebUI takes where the person left it on "Automatic"; "" is
            the model's own.

    Raises:
        TypeError, ValueError: a field's value is not allowed; names the field, the value and what is allowed.
    """

    name: str
    noise_scale: str = "sde_5"
    eta: float = 1.0
    s_noise: float = 1.0
    order: int = 3
    corrector: bool = True
    method: str = "exact"
    start: float = 0.0
    end: float = 1.0
    label: str = ""
    description: str = ""
    scheduler: str = ""

    def __post_init__(self):
        put = lambda field, value: object.__setattr__(self, field, value)
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError("name must be 1 to 64 letters, digits, spaces or any of _ . ( ) + -, and begin with a letter "
                             f"or digit, got {shown(self.name)}")
        check_choice("noise_scale", self.noise_scale, NOISE_SCALES)
        check_choice("method", self.method, METHODS)
        put("eta", check_eta(self.eta))
        put("s_noise", check_real("s_noise", self.s_noise))
        put("order", check_int("order", self.order, 1, METHODS[self.method]))
        check_bool("corrector", self.corrector)
        put("start", check_real("start", self.start, 0.0, 1.0))
        put("end", check_real("end", self.end, 0.0, 1.0))
        if self.start > self.end:
            raise ValueError(f"start must not be above end, got start {self.start} and end {self.end}")
        for field, length in TEXTS.items():
            text = getattr(self, field)
            if not isinstance(text, str):
                raise TypeError(f"{field} must be a text, got {shown(text)}")
            # What a list or a log cannot show: control characters, halves of letters, line ends.
            odd = any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text)
            if len(text) > length or odd:
                raise ValueError(f"{field} must be one line of at most {length} letters, got {shown(text)}")
        put("label", self.label or self.name)

    def replace(self, **changes) -> "Preset":
        """A copy with some fields changed, checked again; an unknown field is a TypeError."""
        for field in changes:
            check_field(field)
        return dataclasses.replace(self, **changes)


FIELDS: Tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Preset) if f.name != "name")
"""The fields of a preset, in the order of its JSON form; `name` is the key there."""


def check_field(field: str) -> None:
    """TypeError for a name that is no field of a preset."""
    if field != "name" and field not in FIELDS:
        raise TypeError(f"unknown field {shown(field)}; a preset has {', '.join(FIELDS)}")


PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (
    Preset("sde_5", label="SDE 5", description=(
        "The published default, to begin with: exp(lambda^0.3) + 10 adds little noise, and most of it early, so it keeps "
        "the ODE's accuracy and still varies.")),
    Preset("ode", "ode", eta=0.0, label="ODE", description=(
        "No noise at all: the same seed converges to one picture as steps grow, for comparing settings and for inversion.")),
    Preset("sde", "sde", label="SDE", description=(
        "Much noise, for 30 steps and more: the reverse-time SDE, varied and forgiving of a model's errors.")),
    Preset("sde_1", "sde_1", label="SDE 1", description=(
        "Hardly any noise: exp(-1/lambda) + 10, an ODE with its errors slightly stirred.")),
    Preset("sde_2", "sde_2", label="SDE 2", description=(
        "Some noise throughout: lambda^0.5 is half-way between the ODE and the reverse-time SDE.")),
    Preset("sde_3", "sde_3", label="SDE 3", description=(
        "The most noise, for many steps: lambda^1.5 goes beyond the reverse-time SDE, for strong variation.")),
    Preset("sde_4", "sde_4", label="SDE 4", description=(
        "Calm first, noisy late: lambda^-0.1 log10(1 + 100 lambda^1.5) keeps the composition and works on detail.")),
    Preset("comfyui", method="comfyui", corrector=False, label="ComfyUI compatible", description=(
        "Pictures shared from ComfyUI's er_sde: its formulas with their 200-point sums, to make such a picture again.")),
    Preset("few_steps", "ode", eta=0.0, order=4, label="few steps", description=(
        "For 4 to 10 steps: no noise, since a run that short cannot smooth it out again; long steps go by the variance that "
        "each picture shows, short ones by up to order 4.")),
    Preset("flat", "sde_5", eta=0.5, s_noise=1.0, end=0.7, label="flat colours", description=(
        "For anime, logos and sharp lines: half the published noise and none in the last 30 % of the schedule, where it "
        "would leave grain on even areas.")),
    Preset("texture", "sde_4", eta=1.0, start=0.2, label="texture", description=(
        "For photographs, skin, cloth and foliage: the composition settles without noise, then late noise keeps feeding "
        "fine detail.")),
)})
"""The built-in presets by name."""


def get_preset(name, presets: Mapping[str, Preset] = PRESETS) -> Preset:
    """The preset of that name (a `Preset` is returned as it is); ValueError names the known ones."""
    return name if isinstance(name, Preset) else presets[check_choice("preset", name, presets)]


def to_dict(preset: Preset) -> Dict[str, object]:
    """The preset's fields without its name, as they stand in a file."""
    return {field: getattr(preset, field) for field in FIELDS}


def _no_duplicates(pairs: List[Tuple[str, object]]) -> Dict[str, object]:
    out: Dict[str, object] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {shown(key)} stands twice")
        out[key] = value
    return out


def _no_constants(text: str):
    raise ValueError(f"{text} is not a number that a preset may have")


def _parse(text: str):
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def _read(path: str) -> Dict[str, object]:
    """The file's object of presets; ValueError or OSError with a reason when it is none."""
    with open(path, "rb") as file:
        data = file.read(_FILE_LIMIT + 1)
    if len(data) > _FILE_LIMIT:
        raise ValueError(f"the file is larger than {_FILE_LIMIT} bytes")
    try:
        found = _parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("the file is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"the file must hold one object {{name: {{field: value}}}}, got {type(found).__name__}")
    return found


def load_presets(path) -> Tuple[Dict[str, Preset], List[str]]:
    """The presets of a user's JSON file, {name: {field: value, ...}, ...}, fields as in `Preset`, missing ones at default.

    Never fatal and never written to: a broken preset is skipped, a broken file gives none.

    Returns:
        The good presets by name, and one line per problem that names the file, the preset and the field.
        A file that does not exist is no problem: no presets.
    """
    path = os.fspath(path)
    try:
        found = _read(path)
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return {}, [f"{path}: {reason}"]
    good: Dict[str, Preset] = {}
    problems: List[str] = []
    for name, fields in found.items():
        try:
            good[name] = _from_dict(name, fields)
        except (TypeError, ValueError) as error:
            problems += [f"{path}: preset {shown(name)}: {reason}" for reason in _field_problems(name, fields) or [error]]
    return good, problems


def _field_problems(name: str, fields) -> List[str]:
    """What is wrong with each field by itself, so that a person sees all of it at once; empty where it is something else."""
    found: List[str] = []
    try:
        Preset(name)
    except ValueError:
        return found
    for field, value in fields.items() if isinstance(fields, dict) and name not in PRESETS else ():
        try:
            _from_dict(name, {field: value})
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def user_presets_path() -> str:
    """Where a person's own presets are: the file that ERSDE_PRESETS names, else user_presets.json in the pack's folder."""
    return os.environ.get("ERSDE_PRESETS") or os.path.join(
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "user_presets.json")


def all_presets() -> Tuple[Mapping[str, Preset], List[str]]:
    """The built-in presets and the person's own behind them, read anew, and `load_presets`' problems."""
    own, problems = load_presets(user_presets_path())
    return MappingProxyType({**PRESETS, **own}), problems


def _from_dict(name: str, fields) -> Preset:
    if not isinstance(fields, dict):
        raise TypeError(f"a preset must be an object {{field: value}}, got {shown(fields)}")
    if name in PRESETS:
        raise ValueError("the name belongs to a built-in preset")
    for field in fields:
        check_field(field)
    if "name" in fields:
        raise TypeError("unknown field 'name'; the key is the name")
    return Preset(name, **fields)


def from_json(name: str, text: str) -> Preset:
    """A preset from the JSON object of its fields, as a user's file holds it under the name; missing ones at default.

    Raises:
        ValueError, TypeError: the text is not such an object, the name or a field is not allowed; names it.
    """
    try:
        fields = _parse(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"preset {name!r}: its settings are not JSON: {error or 'nested too deeply'}") from None
    return _from_dict(name, fields)


def save_preset(path, preset: Preset) -> None:
    """Add `preset` to a user's JSON file, or change it there; the file is replaced as a whole or not at all.

    Raises:
        TypeError: not a preset.
        ValueError: the name is a built-in one, the file there is broken (it is left as it is, for its owner to mend), or it
            would get too large to be read again.
        OSError: the file cannot be read or written.
    """
    if not isinstance(preset, Preset):
        raise TypeError(f"preset must be a Preset, got {shown(preset)}")
    path = os.path.realpath(os.fspath(path))
    if preset.name in PRESETS:
        raise ValueError(f"name must not be that of a built-in preset, got {preset.name!r}")
    with _SAVING:
        try:
            content = _read(path)
        except FileNotFoundError:
            content = {}
        except ValueError as error:
            raise ValueError(f"{path}: {error}; nothing was written") from None
        content[preset.name] = to_dict(preset)
        _replace(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _replace(path: str, data: bytes) -> None:
    """Put `data` in place of the file at once, with the mode it has, by way of a new file beside it."""
    if len(data) > _FILE_LIMIT:
        raise ValueError(f"{path}: the file would get larger than {_FILE_LIMIT} bytes; nothing was written")
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"{os.path.dirname(path)}: no such folder; nothing was written")
    temporary = os.path.join(os.path.dirname(path), f".presets-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
