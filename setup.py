from pathlib import Path

from setuptools import find_packages, setup

# transformers has a RADIO of its own from 5.13 on, but with the weights' names that our checkpoints share with it only
# since 5.18; the LLaVA tower's nested configuration needs 5.20. torch and torchvision must be of one release.
MODELING = ["torch>=2.6", "torchvision>=0.21", "transformers>=5.20,<6", "safetensors>=0.5", "numpy", "pillow>=10"]
TRAINING = [
    "accelerate>=1.10",
    "datasets>=4.0",
    "omegaconf>=2.4",
    "typer>=0.15",
    "rich>=13",
    "tqdm",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "evaluate>=0.4.6",
    "jinja2>=3.1",
]
TEACHERS = ["open_clip_torch>=3.0", "segment-anything>=1.0", "timm>=1.0.31"]
QUICKSTART = [*TEACHERS, "scikit-image>=0.24", "scikit-learn>=1.4"]
EVAL = ["faster-coco-eval>=1.6"]
EXPORT = [
    "onnx>=1.18",
    "onnxscript>=0.6",
    "onnxruntime>=1.22",
    "torchao>=0.14",
]  # transformers' exporters need torch 2.11
LORA = ["peft>=0.17"]
DEMO = ["gradio>=6.31,<7"]
FASTERVIT = ["fastervit>=1.0"]  # its license allows research alone
LMMS = ["lmms-eval>=0.7", "filelock<4.3"]  # lmms-eval reaches into filelock._api, which 4.3 no longer has
# mkdocs for its strict checks, zensical for the pages. zensical's settings may change with 0.1.
DOCS = ["mkdocs>=1.6", "zensical>=0.0.70,<0.1"]
NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
DEV = [
    *QUICKSTART,
    *EVAL,
    *EXPORT,
    *LORA,
    *DEMO,
    "playwright>=1.50",  # drives the browser of some tests
    *FASTERVIT,
    *DOCS,
    *NOTEBOOKS,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "mypy>=1.14",
    "import-linter>=2.1",
    "pre-commit>=4",
    "build>=1.2",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="transformers_radio",
    version="0.1.0",
    description="AM-RADIO on the Hugging Face stack: train, evaluate and use agglomerative vision foundation models.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "transformers_radio": ["quickstart/*.yaml", "quickstart/teachers/**/*", "training/run/*.jinja", "py.typed"]
    },
    install_requires=[*MODELING, *TRAINING],
    extras_require={
        "teachers": TEACHERS,
        "quickstart": QUICKSTART,
        "eval": EVAL,
        "export": EXPORT,
        "demo": DEMO,
        "lora": LORA,
        "fastervit": FASTERVIT,
        "lmms": LMMS,
        "docs": DOCS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["transformers-radio=transformers_radio.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
