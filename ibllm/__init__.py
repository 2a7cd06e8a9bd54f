"ImageBind-LLM: eight senses, one language model. Nothing heavy is imported until it is asked for."
__version__ = "0.1.0"

from importlib import import_module as _import_module

_MODULES = ("world", "inputs", "encoders", "bind", "llama", "cache", "model", "checkpoints", "training", "evaluation",
            "figures", "explorer", "paper_figures")
_HOMES = {"ImageBindLLM": "model", "load": "model"}  # what the package offers at its top, and the module it lives in


def __getattr__(name):
    if name in _MODULES: return _import_module(f"{__name__}.{name}")
    if name in _HOMES: return getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return ["__version__", *_MODULES, *_HOMES]
