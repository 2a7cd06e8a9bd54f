"ImageBind-LLM: eight modalities, one language model. Nothing heavy is imported until it is asked for."
__version__ = "0.1.0"

from importlib import import_module as _import_module

_ROOMS = (
    "files",
    "config",
    "bind",
    "inputs",
    "llama",
    "encoders",
    "shards",
    "cache",
    "objectives",
    "training",
    "saving",
    "model",
    "evaluation",
    "figures",
    "checkpoints",
    "explorer",
    "toyland",
    "experiments",
)
_HOMES = {"ImageBindLLM": "model", "load": "model"}  # what the package offers at its top, and where it lives


def __getattr__(name):
    if name in _ROOMS:
        return _import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return ["__version__", *_ROOMS, *_HOMES]
