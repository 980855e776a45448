"""The programs of docs/sampler.md run as they stand there, each in a process of its own, on small features."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from readme_loop import python_blocks

PAGE = Path(__file__).parents[1] / "docs" / "sampler.md"
IMAGES, DIMENSIONS = 4096, 16
BEFORE_THE_FIRST = """
import numpy
image_features = numpy.load("features.npy", mmap_mode="r")
dataset = range(5 * len(image_features))
"""
AFTERWARDS = """
import numpy
numpy.save("labels.npy", sampler.cluster_ids)
numpy.save("batches.npy", list(sampler))
"""


def program(word: str) -> str:
    (block,) = (code for code in python_blocks(PAGE) if word in code)
    return block


def run(code: str, folder: Path, **environment: str) -> None:
    """On 64 clusters of 64 images or so: a hundredth of the variance is within them."""
    random = np.random.default_rng(0)
    centres = 10 * random.standard_normal((64, DIMENSIONS))
    features = centres[random.integers(0, 64, IMAGES)] + random.standard_normal((IMAGES, DIMENSIONS))
    np.save(folder / "features.npy", features.astype(np.float32))
    (folder / "program.py").write_text(code + AFTERWARDS, encoding="utf-8")
    path = os.pathsep.join([str(PAGE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def check(folder: Path, captions: int, clusters: int) -> None:
    features, labels, batches = (np.load(folder / f"{name}.npy") for name in ("features", "labels", "batches"))
    assert labels.shape == (IMAGES,)
    assert 0 <= labels.min() <= labels.max() < clusters
    sizes = np.bincount(labels)
    assert (sizes > 0).sum() > 0.9 * clusters
    means = np.stack([np.bincount(labels, column) for column in features.T], 1) / np.maximum(sizes, 1)[:, None]
    assert ((features - means[labels]) ** 2).sum() < 0.2 * ((features - features.mean(0)) ** 2).sum()
    assert batches.shape == (IMAGES * captions // 128, 128)
    assert np.mean([len(set(labels[batch // captions].tolist())) for batch in batches]) < 32, "neighbours, 16 clusters"


def test_features(tmp_path: Path) -> None:
    run(BEFORE_THE_FIRST + program("DataLoader"), tmp_path)
    check(tmp_path, captions=5, clusters=IMAGES // 32)


def test_clusters() -> None:
    names: dict[str, np.ndarray] = {}
    exec(program("cluster_features(features"), names)
    assert names["cluster_ids"].shape == (2000,)
    assert len(set(names["cluster_ids"].tolist())) == 40


def test_faiss(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="needs faiss-cpu or another build of faiss")
    run(program("import faiss"), tmp_path)
    check(tmp_path, captions=1, clusters=IMAGES // 64)


@pytest.mark.slow
def test_spark(tmp_path: Path) -> None:
    pytest.importorskip("pyspark", reason="needs pyspark[sql]")
    pytest.importorskip("pyarrow", reason="needs pyspark[sql]")
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        pytest.skip("needs Java")
    spark = {
        "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_SUBMIT_ARGS": "--master local[2] --conf spark.ui.enabled=false pyspark-shell",
    }  # fmt: skip
    run(program("pyspark"), tmp_path, **spark)
    check(tmp_path, captions=1, clusters=IMAGES // 64)
