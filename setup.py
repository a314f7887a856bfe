"""What pyproject.toml cannot say: ds_configs/ and slurm/ become folders of the installed package."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("ds_configs", "slurm")

setup(
    packages=[*find_namespace_packages(include=["mlra_scale*"]), *(f"mlra_scale.{name}" for name in FOLDERS)],
    package_dir={f"mlra_scale.{name}": name for name in FOLDERS},
)
