"""The Stable Diffusion WebUI's entry: samplers, accordion and settings.  All else is in the package's `ersde.hosts.webui`.

The WebUI runs this file when it starts and at every "Reload UI".  Outside a WebUI it does nothing.
"""
import os
import sys


def _start():
    # The package stands beside this folder.  On the path only while it is imported: our file names are nobody else's.
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    before = list(sys.path)
    sys.path.insert(0, root)
    try:
        from ersde.hosts import webui
        return webui.start()
    finally:
        sys.path[:] = before


if "modules.scripts" in sys.modules:        # the WebUI module that loads scripts
    try:
        ErSde = _start()                    # the host takes the classes that stand in a script
    except Exception as error:      # whatever it is, the WebUI must start
        print(f"ER-SDE: the samplers are not available: {type(error).__name__}: {error}", file=sys.stderr)
