"Hand setuptools what settings.ini says; ship the trained Toyland weights in the package."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    license=settings["license"],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={
        extra: settings[f"{extra}_requirements"].split() for extra in ("gpu", "exr", "dev")
    },
    packages=[*find_packages(include=["ibllm", "ibllm.*"]), "ibllm.data"],
    package_dir={"ibllm.data": "data"},
    package_data={"ibllm": ["py.typed"], "ibllm.data": ["toyland/**"]},
    zip_safe=False,
)
