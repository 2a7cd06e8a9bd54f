"Published checkpoints to ours, and back: a room for each kind of file, one for the system."

from .adapter import adapter_weights, load_adapter, load_llama, load_tokenizer
from .imagebind import imagebind_weights, load_imagebind
from .official import download_official, export_official, load_official
from .weights import read_weights, write_weights

__all__ = [
    "adapter_weights",
    "download_official",
    "export_official",
    "imagebind_weights",
    "load_adapter",
    "load_imagebind",
    "load_llama",
    "load_official",
    "load_tokenizer",
    "read_weights",
    "write_weights",
]
