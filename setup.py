"""What pyproject.toml cannot say: the folder configs/ ships inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kd_jax*"]), "kd_jax.shipped.configs"],
    package_dir={"kd_jax.shipped.configs": "configs"},
    package_data={"kd_jax": ["py.typed"], "kd_jax.reporting": ["interactive.js", "vendor/*"]},
)
