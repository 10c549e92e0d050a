"""The standalone demo, `python -m ersde.demo`: real pictures from a model that is known in closed form."""
