"""How files and arrays of every modality become tensors.

A room for each modality, and the processor that joins them."""

from .processor import LOADERS, Processor
from .sources import InputError

__all__ = ["LOADERS", "InputError", "Processor"]
