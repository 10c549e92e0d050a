"""What the WebUI's page has of us: the accordion, the settings page, the axes of the X/Y/Z plot, pasting of an infotext."""
from __future__ import annotations

from html import escape

from ..presets import Preset, all_presets
from . import webui
from . import webui_settings as settings
from .webui_curve import draw
from .webui_settings import AS_PRESET, PREFIX, SETTINGS, sampler_name

TITLE = "ER-SDE"
"""The accordion's name, and the script's in `alwayson_scripts`."""


def add_settings() -> None:
    """Our section of the settings page: a default for each setting, and which entries to leave out of the list."""
    import gradio as gr
    from modules import shared
    from modules.options import OptionInfo

    def info(default, text, component, arguments):
        shown = OptionInfo(default, text, component, arguments, section=("ersde", "ER-SDE"))
        shown.category_id = "sd"
        return shown

    for setting in SETTINGS:
        kind, arguments = _control(gr, setting, all_presets()[0])
        # The host hands these to the component's update, which does not know all that its constructor knows.
        arguments.pop("allow_custom_value", None)
        shared.opts.add_option(setting.option, info(setting.unset, f"Default {setting.name}", kind, arguments)
                               .info(setting.help + "; what the accordion says goes before it"))
    names = [sampler_name(preset) for preset in all_presets()[0].values()]
    shared.opts.add_option(webui.HIDDEN, info([], "Entries to leave out of the sampler list", gr.CheckboxGroup,
                                              {"choices": names})
                           .info("the API and pasted infotexts still know them").needs_reload_ui())


def _control(gr, setting: settings.Setting, presets):
    """The gradio class of a setting's control and its arguments."""
    if setting.choices is None:
        return gr.Textbox, {"placeholder": AS_PRESET, "max_lines": 1}
    # Any text is let through: what an infotext of another version has must show as it is, and be answered in words.
    return gr.Dropdown, {"choices": [AS_PRESET, *setting.choices(presets)], "allow_custom_value": True}


def add_callbacks() -> None:
    """What the host calls later: the axes once the plot's script is loaded, and each pasting of an infotext."""
    from modules import script_callbacks

    script_callbacks.on_before_ui(add_axes)
    script_callbacks.on_infotext_pasted(fill_in)


def fill_in(text: str, params: dict) -> None:
    """Say of each setting that a pasted infotext does not name what it was."""
    params.update(settings.pasted(params, webui.page_defaults(), all_presets()[0]))


def add_axes() -> None:
    """One axis for each setting in the X/Y/Z plot script, once."""
    from modules import scripts

    for data in scripts.scripts_data:
        options = getattr(data.module, "axis_options", None)
        if options is None or not hasattr(data.module, "AxisOption"):
            continue
        known = {option.label for option in options}
        options.extend(axis for axis in map(lambda s: _axis(data.module, s), SETTINGS) if axis.label not in known)


def _axis(module, setting: settings.Setting):
    def put(p, x, xs):
        # A new dict: the plot's cells are shallow copies of one another.
        p.ersde_axes = {**getattr(p, "ersde_axes", {}), setting.field: x}

    def confirm(p, xs):
        for x in xs:
            try:
                settings.read(setting.field, x, all_presets()[0])
            except (TypeError, ValueError) as error:
                raise RuntimeError(f"ER-SDE: {error}") from None

    choices = None if setting.choices is None else lambda: setting.choices(all_presets()[0])
    return module.AxisOption(f"[{TITLE}] {setting.name}", setting.axis, put, confirm=confirm, choices=choices)


def shown(sampler: str, *arguments) -> str:
    """The accordion's last part, as HTML: the curve, and one line of what a run with these controls would use; below it what
    is wrong with the person's own presets."""
    presets, problems = all_presets()
    wrong = "".join(_line(problem, _RED) for problem in problems)
    base = {sampler_name(preset): preset for preset in reversed(presets.values())}.get(sampler)
    if base is None:
        return _line(f"The sampler chosen is not one of ours: these settings are for those named {PREFIX}...") + wrong
    try:
        used = settings.apply(base, {"settings page": webui.page_defaults(), "here": settings.from_arguments(arguments)},
                              presets)
    except (TypeError, ValueError) as error:
        return draw(base) + _line(f"{error}; a run goes on with the sampler's preset", _RED) + wrong
    return draw(used, base) + _summary(base, used) + wrong


_RED = "color:#d03030;font-weight:bold"     # readable on white and on black


def _line(text: str, style: str = "") -> str:
    return f'<p style="{style}">{escape(text)}</p>'


def _summary(base: Preset, used: Preset) -> str:
    """All settings in one line, those that differ from the sampler's preset in bold."""
    parts = [f"<b>{escape(used.label)}</b>" if used.name != base.name else escape(used.label)]
    for setting in SETTINGS[1:]:
        value = getattr(used, setting.field)
        text = escape(f"{setting.name} {settings.text_of(value)}")
        parts.append(f"<b>{text}</b>" if value != getattr(base, setting.field) else text)
    if used.method != "exact":
        parts.append(escape(f"formulas of {used.method!r}"))
    return f"<p>{', '.join(parts)}</p>"


def script_class():
    """The accordion, as a class that the host makes one object of for each tab."""
    import gradio as gr
    from gradio.context import Context
    from modules import scripts

    class ErSde(scripts.Script):
        """The accordion on txt2img and img2img."""

        _sampler = None         # the page's sampler list, once it is made
        _page = None            # our own controls and the place of the curve, with the page they stand in

        def title(self):
            return TITLE

        def show(self, is_img2img):
            tab = "img2img" if is_img2img else "txt2img"
            self.on_after_component(self._see_sampler, elem_id=f"{tab}_sampling")
            return scripts.AlwaysVisible

        def ui(self, is_img2img):
            presets, controls = all_presets()[0], []
            with gr.Accordion(TITLE, open=False, elem_id=self.elem_id("accordion")):
                for pair in zip(SETTINGS[::2], SETTINGS[1::2]):
                    with gr.Row():
                        for setting in pair:
                            kind, arguments = _control(gr, setting, presets)
                            controls.append(kind(label=setting.name, value=setting.unset, info=setting.help,
                                                 elem_id=self.elem_id(setting.field), **arguments))
                curve = gr.HTML(shown("", *(setting.unset for setting in SETTINGS)), elem_id=self.elem_id("curve"))
            self.infotext_fields = [(control, setting.label) for control, setting in zip(controls, SETTINGS)]
            self.paste_field_names = [setting.label for setting in SETTINGS]
            self._page = Context.root_block, controls, curve
            self._follow()
            return controls

        def _see_sampler(self, made):
            self._sampler = Context.root_block, made.component
            self._follow()

        def _follow(self):
            """Let the curve follow the controls and the sampler's list, once both are made, whichever comes first.

            The host also calls `ui` to learn the defaults, on a page of its own that has no sampler list.
            """
            if self._sampler is None or self._page is None or self._sampler[0] is not self._page[0]:
                return
            sampler, (_, controls, curve) = self._sampler[1], self._page
            curve.value = shown(sampler.value, *(control.value for control in controls))
            for control in (sampler, *controls):
                control.change(fn=shown, inputs=[sampler, *controls], outputs=[curve], show_progress="hidden", queue=False)

        def process(self, p, *arguments):
            for label in settings.LABELS:       # the cells of a plot share them
                p.extra_generation_params.pop(label, None)
            p.ersde_page = settings.from_arguments(arguments)

    return ErSde

