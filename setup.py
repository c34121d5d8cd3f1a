"""Metadata of bnres; tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import setup

TEST = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "numpy"]

setup(
    name="bnres",
    version="0.1.0.dev0",
    description="Fused batch norm for residual networks: Triton kernels and drop-in layers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=["bnres", "bnres.kernels", "bnres.nn"],
    package_dir={"bnres.kernels": "kernels"},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system=='Linux'"],
    extras_require={"test": TEST, "dev": [*TEST, "ruff>=0.17", "mypy>=2.0"]},
)
