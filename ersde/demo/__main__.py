"""`python -m ersde.demo [--out DIR] [--quick]`: sample pictures and write a page that shows them."""
from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import List, Optional

_MISSING = "the demo needs {}, which this Python does not have; `python install.py demo` brings it"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ersde.demo",
        description="Sample small pictures from the trained network with every preset and write a page that shows them.")
    parser.add_argument("--out", default="demo_out", metavar="DIR",
                        help="folder for the page and its pictures, made if it is not there (default: demo_out)")
    parser.add_argument("--quick", action="store_true", help="fewer steps: a few seconds, for a first look")
    return parser


def _fail(text: str) -> int:
    print(f"ersde.demo: {text}", file=sys.stderr)
    return 2


def _prepare(out: Path) -> Optional[str]:
    """Make the folder and try to write there, before anything is computed; a line on what is wrong, or None."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            return f"--out: no permission to write in {out}"
    except (FileExistsError, NotADirectoryError):
        return f"--out must be a folder, but {out} is a file or lies below one"
    except (OSError, ValueError) as error:
        return f"--out: cannot make the folder {out}: {getattr(error, 'strerror', None) or error}"
    return None


def main(arguments: Optional[List[str]] = None) -> int:
    """Run the demo; returns the exit code: 0, or 2 for something the user has to put right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    out = Path(options.out)
    problem = _prepare(out)
    if problem:
        return _fail(problem)
    try:
        import safetensors  # noqa: F401
        import sklearn
        import torch
        from tqdm import tqdm

        import ersde

        from . import figures, page
    except ImportError as error:
        return _fail(_MISSING.format(error.name or "a package"))

    begin = time.perf_counter()
    size = figures.QUICK if options.quick else figures.Size()
    try:
        with tqdm(total=1, unit="call", bar_format="{desc:<24} {percentage:3.0f}% |{bar}| {elapsed} left {remaining}",
                  mininterval=0.2) as bar:
            work = figures.Work(size, bar.update)
            parts = figures.Trained(size, bar.update).parts() + work.parts()
            bar.total = sum(calls for _, calls, _ in parts)
            done = []
            for what, _, make in parts:
                bar.set_description_str(what)
                shown, image = make()
                shown.width, shown.height = image.size
                image.save(out / shown.file, optimize=True)
                done.append(shown)
            bar.set_description_str("done")
        facts = [("command", shlex.join(["python", "-m", "ersde.demo", *arguments])), ("ersde", ersde.__version__),
                 ("torch", torch.__version__), ("scikit-learn", sklearn.__version__),
                 ("Python", platform.python_version()), ("seed", str(figures.SEED)),
                 ("time", f"{time.perf_counter() - begin:.0f} s")]
        index = out / "index.html"
        index.write_text(page.page(done, len(work.models["ve"].means), facts), encoding="utf-8")
    except ImportError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("ersde.demo: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(f"cannot write to {out}: {error.strerror or error}")
    print(f"Open {index.resolve()}")
    return 0


if __name__ == "__main__":
    try:
        import torch
    except ImportError:
        pass            # main says so
    else:
        # The model's tensors are small: more threads cost more than they gain.
        torch.set_num_threads(1)
    sys.exit(main())
