"""The page: plain HTML and CSS, no scripts and nothing from a network."""
from __future__ import annotations

from html import escape
from typing import Sequence, Tuple

from .figures import STD, Shown

_CSS = """
:root {
  color-scheme: light dark; --ink: #1d2229; --quiet: #5a6472; --paper: #fbfaf8; --line: #dedbd4; --link: #1f5fa8;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e4df; --quiet: #a3a9b3; --paper: #17191d; --line: #34383f; --link: #8ab8f0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 system-ui, "Segoe UI", Roboto, Helvetica,
  "DejaVu Sans", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0; }
a { color: var(--link); }
nav { margin: 1.4rem 0 0; padding: .9rem 0; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
nav ol { margin: 0; padding-left: 1.5rem; columns: 2 20rem; column-gap: 2.5rem; }
section { margin-top: 3.2rem; }
figure { margin: 1rem 0 0; }
figure a { display: block; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption, .quiet { color: var(--quiet); font-size: .88rem; max-width: 54rem; margin-top: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0 .5rem; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem 1rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
code { font: .9em ui-monospace, "DejaVu Sans Mono", Consolas, monospace; overflow-wrap: anywhere; }
"""


def _table(rows: Sequence[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in rows[0])
    body = "".join("<tr>" + f'<th scope="row">{escape(row[0])}</th>'
                   + "".join(f"<td>{escape(text)}</td>" for text in row[1:]) + "</tr>\n" for row in rows[1:])
    return (f'<div class="scroll"><table aria-label="{escape(caption)}">\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}</tbody></table></div>\n")


def _section(number: int, shown: Shown) -> str:
    file = escape(shown.file)
    parts = [f'<section id="f{number}">\n<h2>{number}. {escape(shown.title)}</h2>\n<p>{escape(shown.look)}</p>\n',
             f'<figure><a href="{file}"><img src="{file}" width="{shown.width}" height="{shown.height}" '
             f'alt="{escape(shown.alt)}"></a>\n<figcaption>{escape(shown.settings)}</figcaption></figure>\n']
    if shown.table:
        parts.append(_table(shown.table, shown.title))
    parts += [f"<p>{escape(note)}</p>\n" for note in shown.notes]
    return "".join(parts) + "</section>\n"


def page(figures: Sequence[Shown], count: int, facts: Sequence[Tuple[str, str]]) -> str:
    """The page's HTML.

    Args:
        figures: with width and height of their PNGs filled in.
        count: pictures in the data set.
        facts: (what, value) of the run, for the bottom of the page.
    """
    links = "".join(f'<li><a href="#f{i}">{escape(shown.title)}</a></li>\n' for i, shown in enumerate(figures, 1))
    sections = "".join(_section(i, shown) for i, shown in enumerate(figures, 1))
    run = "".join(f"<br>\n{escape(what)}: <code>{escape(value)}</code>" for what, value in facts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ER-SDE samplers: demo</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<h1>ER-SDE samplers at work</h1>
<p>Each picture below was sampled from noise by a small network that lies in this pack: 1.7 million parameters, trained
on Noto Color Emoji at 32&#8239;&times;&#8239;32, once for the process ve and once for flow, with classifier-free
guidance. Same seed, same start, in every cell of a figure: what differs is the sampler.</p>
<p>The curves and the errors at the end are of the solver itself. The errors are measured on an exact model: {count}
handwritten digits with a Gaussian spread of {STD:g} around each form a mixture whose denoiser is known in closed
form.</p>
<p class="quiet">Pictures are enlarged with bicubic interpolation. The network is small, and some of its pictures are
broken at any number of steps; what a sampler adds to that, or takes away, shows beside the others.</p>
<nav aria-label="Figures"><ol>
{links}</ol></nav>
{sections}
<footer class="quiet">
<p>Network: ersde/demo/weights, with its model card; trained on Noto Color Emoji by Google, Apache License 2.0 (flags:
public domain or not subject to copyright). euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde and dpmpp_3m_sde are
k-diffusion's functions (Katherine Crowson, MIT).</p>
<p>Data of the errors: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, licence CC&nbsp;BY&nbsp;4.0, as distributed with scikit-learn; scaled to [-1, 1]. The pictures on this
page are samples, not originals.</p>
<p>This run{run}</p>
</footer>
</main>
</body>
</html>
"""
