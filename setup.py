"""Packaging of cbn_det. The requirement lists below are the only ones: make reads them here."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The commit that every test and table of this project ran with.
DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
DETECTRON2 = (
    f"detectron2 @ git+https://github.com/facebookresearch/detectron2.git@{DETECTRON2_COMMIT}"
)

# The layers, convert_norm, PreciseBN, EvalNorm and fold. Nothing asks for OpenCV: its four builds
# (plain, headless, each with contrib) share one folder and overwrite each other, so the one that is
# there is best left alone, and nothing here needs it.
REQUIRES = ["torch>=2.1"]
# Both engines: configs, data sets with the built-in digits, evaluation, pictures, curves.
_TRAINING = [
    *("numpy", "torchvision", "fvcore", "pycocotools", "pillow", "tqdm", "tabulate"),
    *("scikit-learn", "tensorboard"),
]
_COMPARE = [*_TRAINING, "matplotlib", "jinja2"]
EXTRAS = {
    # make docs
    "docs": ["mkdocs==1.6.1", "mkdocs-material==9.8.2", "mkdocstrings-python==2.0.11"],
    # detectron2.model_zoo imports pkg_resources, which setuptools dropped in version 81. Its build
    # imports torch: install this extra with `pip install --no-build-isolation`.
    "detectron2": [*_TRAINING, "setuptools<81", DETECTRON2],
    # cbn-det train, check, deploy and predict on torchvision's parts.
    "standalone": _TRAINING,
    # cbn-det compare, reproduce and demo: tables, curves and the report.
    "compare": _COMPARE,
    # cbn-det deploy --format onnx.
    "deploy": [*_TRAINING, "onnx", "onnxruntime"],
    # ... --submit: runs as jobs of a SLURM cluster.
    "slurm": [*_COMPARE, "submitit"],
    # What make runs: demo, tests and lint.
    "dev": [*_COMPARE, "pytest", "pytest-timeout", "pytest-xdist", "black>=26,<27", "ruff"],
}


def read_version() -> str:
    """Return `__version__` of cbn_det/__init__.py without importing it (torch may be missing).

    Raises:
        RuntimeError: the file has no `__version__ = "..."` line.
    """
    text = (HERE / "cbn_det" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if not found:
        raise RuntimeError('cbn_det/__init__.py has no line `__version__ = "..."`')
    return found.group(1)


def config_folders() -> list[str]:
    """The folders of ``configs/``, dotted."""
    folders = sorted(path for path in (HERE / "configs").rglob("*") if any(path.glob("*.*")))
    return [".".join(path.relative_to(HERE / "configs").parts) for path in folders]


def main() -> None:
    """Call setuptools. It is imported here so that the lists above can be read without it."""
    from setuptools import find_packages, setup

    # configs/ has its home at the top; in a wheel it is a folder of the package
    configs = ["cbn_det.configs", *(f"cbn_det.configs.{name}" for name in config_folders())]
    setup(
        name="cbn-det",
        version=read_version(),
        description="Normalisation layers for detectors trained at 1-2 images per GPU",
        long_description=(HERE / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        author="The cbn_det authors",
        license="Apache-2.0",
        python_requires=">=3.10",
        packages=[*find_packages(include=["cbn_det", "cbn_det.*"]), *configs],
        package_dir={"cbn_det.configs": "configs"},
        package_data={
            "cbn_det": ["py.typed"],
            "cbn_det.standalone": ["*.yaml"],
            "cbn_det.study": ["*.jinja", "published.yaml"],
            **{name: ["*.yaml"] for name in configs},
        },
        entry_points={"console_scripts": ["cbn-det = cbn_det.cli:main"]},
        install_requires=REQUIRES,
        extras_require=EXTRAS,
    )


if __name__ == "__main__":
    main()
