"""The table of checkpoint families: what the other rooms ask of an autoencoder without knowing which kind it is.

    family = family_of(cell.autoencoder)
    family.layer, family.draws_identity()               # planning: no weights are read, torch is not imported for a pair
    av = family.load_verbalizer(("cuda",))
    ar = family.load_reconstructor(("cuda",), av)

A new family is a class (`base.Family`) in a package of its own and one line in `FAMILIES`. Files are inspected once, by the first
question that needs them, so any method or property may raise the CheckpointError of a file that is missing, damaged or of
another kind.
"""

from __future__ import annotations

from ksweep.autoencoder.base import Family
from ksweep.autoencoder.given_texts import TextsForAr, TextsForEncoder
from ksweep.autoencoder.nla.family import NlaPair
from ksweep.autoencoder.own_parts import OwnParts
from ksweep.autoencoder.tae.family import TaeFile
from ksweep.config.spec import Autoencoder
from ksweep.utils.errors import SpecError

FAMILIES: tuple[type[Family], ...] = (TextsForAr, TextsForEncoder, OwnParts, NlaPair, TaeFile)
"""Families in the order in which they are asked whether a spec is theirs; the first that claims it has it."""


def family_of(autoencoder: Autoencoder) -> Family:
    """Return the autoencoder as an object of the family that claims it.

    Raises:
        SpecError: no family claims it.
    """
    for family in FAMILIES:
        if family.claims(autoencoder):
            return family(autoencoder)
    raise SpecError(
        f"{autoencoder.source} belongs to none of the families {', '.join(family.__name__ for family in FAMILIES)}: check "
        "autoencoder.av, autoencoder.ar and autoencoder.checkpoint"
    )
