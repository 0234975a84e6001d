from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    for line in (ROOT / "lavis_dcd" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("lavis_dcd/__init__.py states no __version__")


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


setup(
    name="lavis-dcd",
    version=version(),
    description="Dynamic Contrastive Distillation for image-text retrieval: a plug-in of LAVIS",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["LAVIS", "image-text retrieval", "knowledge distillation", "vision-language", "METER", "dual encoder"],
    project_urls={"Paper": "https://arxiv.org/abs/2207.01426", "LAVIS": "https://github.com/salesforce/LAVIS"},
    python_requires=">=3.10,<3.12",
    # `lavis` here is one folder with the two launchers. In a wheel they land beside LAVIS's own modules; in
    # an editable install setuptools' finder is asked only for what the real package lacks. configs/ and
    # projects/ are data, kept at the top of the checkout and shipped inside the package.
    packages=[
        *find_packages(include=["lavis_dcd", "lavis_dcd.*"]),
        "lavis_dcd.configs",
        "lavis_dcd.projects",
        "lavis",
    ],
    package_dir={
        "lavis_dcd.configs": "configs",
        "lavis_dcd.projects": "projects",
        "lavis": "lavis_dcd/launch",
    },
    package_data={
        "lavis_dcd": ["py.typed", "assets/**", "**/*.html", "**/*.jinja", "**/*.j2", "**/*.css"],
        "lavis_dcd.configs": ["**/*.yaml"],
        # not example_plugin/: a package of its own, for a checkout
        "lavis_dcd.projects": ["dcd/*.yaml"],
    },
    include_package_data=False,
    # torch and torchvision are one tested pair; LAVIS 1.0.2 brings the tight pins of transformers, timm and
    # fairscale, and an OpenCV that was built against NumPy 1.
    install_requires=[
        "salesforce-lavis==1.0.2",
        "torch>=2.12,<2.13",
        "torchvision>=0.27,<0.28",
        "transformers>=4.25,<4.27",
        "timm==0.4.12",
        "fairscale==0.4.4",
        "numpy<2",
        # LAVIS brings it along (through streamlit); from 26 on its wheels need NumPy 2
        "pyarrow<26",
        "omegaconf>=2.3,<3",
        "pycocotools",
        "safetensors",
        "tensorboard",
        "jinja2",
        "tqdm",
        "typing_extensions>=4.4",
        "pillow",
    ],
    extras_require={
        "heic": ["pillow-heif"],  # pictures of phones; see lavis_dcd/datasets/opener.py
        "test": ["pytest", "pytest-xdist", "hypothesis", "setuptools>=64,<81", "wheel"],
        "lint": ["ruff", "mypy", "import-linter", "types-PyYAML", "types-tqdm"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "License :: OSI Approved :: Apache Software License",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
