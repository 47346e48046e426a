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
EVALUATION = ["faster-coco-eval>=1.6"]
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
DEV = [
    *QUICKSTART,
    *EVALUATION,
    *EXPORT,
    *LORA,
    *DEMO,
    "playwright>=1.50",  # drives the browser of some tests
    *FASTERVIT,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "mypy>=1.14",
    "import-linter>=2.1",
    "pre-commit>=4",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="transformers_radio",
    version="0.1.0",
    description="AM-RADIO on the Hugging Face stack: train, evaluate and use agglomerative vision foundation models.",
    long_description=open("README.md", encoding="utf-8").read(),
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
        "evaluation": EVALUATION,
        "export": EXPORT,
        "lora": LORA,
        "demo": DEMO,
        "fastervit": FASTERVIT,
        "lmms": LMMS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["transformers-radio=transformers_radio.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
