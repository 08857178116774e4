"Installs cromss. Everything is read from settings.ini, the one configuration; only what settings.ini cannot say stands here."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
TEMPLATES = ("pretrain", "finetune", "ablation")   # papermill templates of nbs/ that travel in the wheel, once they exist

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


class BuildWithTemplates(build_py):
    "Copies the papermill templates and the published tables from nbs/ into the wheel, so that they exist once in the repository."

    def _templates(self):
        target = Path(self.build_lib) / "cromss"
        books = {target / "templates" / f"{name}.ipynb": ROOT / "nbs" / f"{name}.ipynb" for name in TEMPLATES}
        tables = {target / "published" / path.name: path for path in (ROOT / "nbs" / "published").glob("*.csv")}
        return {to: path for to, path in {**books, **tables}.items() if path.is_file()}

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False): return    # a checkout has them in nbs/
        for target, source in self._templates().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=1):
        copied = [] if getattr(self, "editable_mode", False) else [str(target) for target in self._templates()]
        return [*super().get_outputs(include_bytecode), *copied]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license={"apache2": "Apache-2.0", "mit": "MIT"}[settings["license"]],
    license_files=["LICENSE"],
    keywords=settings["keywords"],
    classifiers=[
        {"3": "Development Status :: 3 - Alpha", "4": "Development Status :: 4 - Beta"}[settings["status"]],
        f"Intended Audience :: {settings['audience']}",
        "Topic :: Scientific/Engineering :: GIS",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["cromss", "cromss.*"]),
    install_requires=settings["requirements"].split(),
    extras_require={
        **{name: settings[f"{name}_requirements"].split() for name in ("dev", "app", "peers", "export")},
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=2.16"],
    },
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithTemplates},
    zip_safe=False,
)
