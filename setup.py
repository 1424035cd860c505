"The package's metadata, read from settings.ini, which is nbdev's too."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser()
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
stages = "Planning, Pre-Alpha, Alpha, Beta, Production/Stable, Mature, Inactive".split(", ")

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    classifiers=[
        f"Development Status :: {cfg['status']} - {stages[cfg.getint('status') - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["capo", "capo.*"]),
    package_data={"capo": ["py.typed", "base/**"]},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={key.removesuffix("_requirements"): shlex.split(value)
                    for key, value in cfg.items() if key.endswith("_requirements")},
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"]),
                  "verl.plugins": ["capo = capo.verl"]},  # verl imports it, and it registers itself
    zip_safe=False,
)
