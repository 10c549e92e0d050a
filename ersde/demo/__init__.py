"""The embedded model, the standalone demo `python -m ersde.demo`, and the command line `python -m ersde`."""
