import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = (here / "protomem" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]


class BuildWithConfigs(build_py):
    """A wheel has the recipes inside of the package; an editable install finds them beside it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(here / "configs", Path(self.build_lib) / "protomem" / "configs", dirs_exist_ok=True)


setup(
    name="protomem",
    version=version,
    description="Embedding models on millions of identities, with prototypes sharded over ranks",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["protomem", "protomem.*"]),
    package_data={"protomem.data.faces": ["*.npz", "NOTICE"]},
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=[
        "torch>=2.9",
        "numpy>=1.26",
        "omegaconf>=2.4",
        "typer>=0.12",
        "rich>=13",
        "pillow>=10",
        "simplejpeg>=1.7",
        "scikit-learn>=1.4",
        "matplotlib>=3.8",
        "safetensors>=0.4",
    ],
    extras_require={
        "cuda13": ["nvidia-dali-cuda130>=2.0"],
        "cuda12": ["nvidia-dali-cuda120>=2.0"],
        "kernels": ["triton>=3.5; platform_system == 'Linux'"],
        "wandb": ["wandb>=0.18"],
        "tensorboard": ["tensorboard>=2.17"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "wandb>=0.18",
            "tensorboard>=2.17",
            "triton>=3.5; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["protomem=protomem.cli:main"]},
)
