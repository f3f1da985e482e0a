"""Grams (2412.17107): the magnitude of Adam's update, the sign of the gradient. Dense."""

from .adamw import AdamWOracle


class GramsOracle(AdamWOracle):
    """The official code has Hugging Face's ε and, alone among the GaLore-era repositories, decays before the update."""

    def __init__(self, W0, **settings):
        super().__init__(W0, transform="grams", **settings)
