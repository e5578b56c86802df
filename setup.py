"""All package metadata of stm-kernels: what it is called, what it needs and the `stm` command."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="stm-kernels",
    version="0.1.0",
    description="Video object segmentation with a space-time memory, around a fused memory read",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["stm_kernels", "stm_kernels.*", "stm_model", "stm_model.*"]),
    package_data={
        "stm_kernels": ["py.typed"],
        "stm_model": [
            "py.typed",
            "weights/*.safetensors",
            "weights/*.jsonl",
            "weights/*.md",
            "data/splits/*/*.txt",
            "evaluation/quoted.csv",
            "plugins/napari.yaml",
            "evaluation/templates/*",
            "interactive/report.html",
            "interactive/web/page/*",
        ],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "numpy>=2",
        "einops>=0.8",
        "tyro",
        "tqdm",
        "av",
        "Pillow",
        "safetensors",
        "scipy",
        "matplotlib",
        "Jinja2",
        "filelock",
        "pycocotools",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "import-linter",
            "mypy",
            "build",
            "mkdocs-material",
            "mkdocstrings[python]",
            "fastapi",
            "uvicorn",
            # what FastAPI's test client asks with
            "httpx2",
            # drives a browser that is there already
            "playwright",
            # an FFmpeg that feeds a pipe
            "imageio-ffmpeg",
            # what users read exported masks with
            "supervision",
            "cvat-cli",
            "OpenEXR>=3.5",
        ],
        "train": ["tensorboard"],
        "app": ["fastapi", "uvicorn"],
        "exr": ["OpenEXR>=3.5"],
        "supervision": ["supervision"],
        "cvat": ["cvat-cli"],
        "napari": ["napari[pyside6]"],
    },
    entry_points={
        "console_scripts": ["stm=stm_model.commands.main:run"],
        "napari.manifest": ["stm-kernels = stm_model.plugins:napari.yaml"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
