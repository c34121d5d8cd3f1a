"""The package metadata of bnres. The tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import setup

TRAIN = [
    "matplotlib>=3.8",
    "mlxtend>=0.23",
    "numpy>=1.26",
    "pillow>=10",
    "pooch>=1.8",
    "rich>=13",
    "safetensors>=0.4",
    "scikit-learn>=1.4",
    "typer>=0.15",
]
BENCH = [
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pytest>=8",
    "pytest-benchmark>=5",
    "typer>=0.15",
]
TEST = [
    *TRAIN,
    "tensorboard>=2.15",
    "hypothesis>=6.100",
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "onnxscript>=0.3",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "setuptools>=77",
    "timm>=1.0",
    "torchvision>=0.26",
]

PACKAGES = (
    "augment",
    "data",
    "doctor",
    "functional",
    "fusion",
    "kernels",
    "models",
    "nn",
    "operations",
    "train",
)

# Packages that the samples of docs/recipes.md need.
RECIPES = [
    "accelerate>=1.1",
    "lightning>=2.4",
    "segmentation-models-pytorch>=0.4",
    "timm>=1.0",
    "transformers>=4.50",
    "ultralytics>=8.3",
]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings-python>=1.12"]

setup(
    name="bnres",
    version="0.1.0",
    description="Fused batch norm for residual networks: Triton kernels and drop-in layers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=["bnres", *(f"bnres.{p}" for p in PACKAGES)],
    # With this, an editable install adds the clone's folder to sys.path. Otherwise setuptools would
    # install an import finder, which Python asks only after searching sys.path. If Python then
    # started in the folder that contains the clone, it would import the clone as an empty package.
    package_dir={"": "."},
    package_data={"bnres": ["py.typed"]},
    entry_points={
        "console_scripts": ["bnres = bnres.cli:app"],
        "torch_dynamo_backends": ["bnres = bnres.fusion.backend:backend"],
    },
    install_requires=["torch>=2.11", "triton>=3.6; platform_system=='Linux'"],
    extras_require={
        "train": TRAIN,
        "tensorboard": ["tensorboard>=2.15"],
        "bench": BENCH,
        "test": TEST,
        "docs": DOCS,
        "recipes": RECIPES,
        "dev": [*TEST, *BENCH, "ruff>=0.17", "mypy>=2.0"],
    },
)
