"""An index of images, kept in a folder, that is asked in words or by picture."""

from __future__ import annotations

import beside  # isort: skip  # noqa: F401

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from collection import Collection, Item, thumbnail
from data_files import digest, load_array
from pictures import feature_maps, open_picture, sheet
from PIL import Image
from saved_encoders import load_encoders, save_encoders
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Found:
    """The most similar images first. A notebook shows the thumbnails, a terminal the table."""

    asked: str
    items: list[Item]
    scores: list[float]
    """Cosines, from -1 to 1."""
    unknown: list[str]
    """Words of the question that the text encoder does not know."""

    def __repr__(self) -> str:
        lines = [f"{score:6.3f}  {item.file if item.row < 0 else item}" for item, score in self]
        return "\n".join([*([self.note] if self.unknown else []), *lines])

    def __iter__(self) -> Iterator[tuple[Item, float]]:
        return iter(zip(self.items, self.scores, strict=True))

    @property
    def note(self) -> str:
        return f"not known: {', '.join(self.unknown)}" if self.unknown else ""

    def sheet(self) -> Image.Image:
        """The contact sheet."""
        title = f"{self.asked}   ({self.note})" if self.unknown else self.asked
        return sheet(title, [(thumbnail(item), f"{score:.3f}  {item}") for item, score in self])

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.sheet().save(buffer, "PNG")
        return buffer.getvalue()


class Searcher:
    """Opens the index in ``folder``.

    Raises:
        FileNotFoundError, ValueError: there is none, or its files do not fit one another.
    """

    def __init__(self, folder: Path, bert: str | None = None) -> None:
        folder = Path(folder)
        if not (folder / "items.json").is_file():
            raise FileNotFoundError(f"{folder}: expected an index, found no items.json: make one with --of")
        self.encoders = load_encoders(folder / "encoders.pt", bert)
        try:
            content = json.loads((folder / "items.json").read_text("utf-8"))
            stored = (folder / "index.faiss").read_bytes()
            if content["sha256"] != digest([stored, json.dumps(content["items"])]):
                raise ValueError("the contents do not fit their checksum")
            self.index = faiss.deserialize_index(np.frombuffer(stored, np.uint8))
            self.items = [Item(*item) for item in content["items"]]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # the last of faiss, or of deep JSON
            reason = str(error).splitlines()[0] or type(error).__name__
            raise ValueError(f"{folder}: expected a whole index ({reason}): make it again with --of") from error
        if (self.index.ntotal, self.index.d) != (len(self.items), self.encoders.arguments["embed_dim"]):
            raise ValueError(
                f"{folder}: expected {len(self.items)} embeddings of {self.encoders.arguments['embed_dim']} numbers, "
                f"found {self.index.ntotal} of {self.index.d}: make the index again with --of"
            )

    def words(self, text: str, top: int = 12) -> Found:
        """The ``top`` images most similar to ``text``. Unknown words are in the answer.

        Raises:
            ValueError: the text is empty, or none of its words is known.
        """
        unknown = self.encoders.unknown(text)
        if not text.strip() or not self.encoders.knows(text):
            raise ValueError(f"none of these words is known: {', '.join(unknown)}" if unknown else "expected words")
        return self._nearest(text, self.encoders.texts([text]), top, unknown)

    def picture(self, picture: Path | bytes, top: int = 12) -> Found:
        """The ``top`` images most similar to a picture, or to a file of features ``.npy`` (R, F).

        Raises:
            ValueError: it does not open.
        """
        path = None if isinstance(picture, bytes) else Path(picture)
        stored = path is not None and path.suffix == ".npy"
        features = [load_array(path)] if stored else feature_maps([open_picture(picture)])
        return self._nearest(path.name if path else "a picture", self.encoders.images(features), top, [])

    def _nearest(self, asked: str, embedding: Tensor, top: int, unknown: list[str]) -> Found:
        scores, places = self.index.search(embedding.numpy(), min(top, len(self.items)))
        return Found(asked, [self.items[i] for i in places[0]], scores[0].tolist(), unknown)


def make_index(folder: Path, source: Path, encoders: Path, bert: str | None = None) -> list[str]:
    """Encodes ``source`` (see :class:`collection.Collection`) and writes an index to ``folder``: the embeddings,
    the list of the items, and the encoders to ask with. Returns what was left out, a line each.

    Raises:
        FileNotFoundError, ValueError: the encoders do not load or take other features, or there is nothing to encode.
    """
    model = load_encoders(encoders, bert)
    collection = Collection(source.resolve())
    embeddings = model.images(collection).numpy()
    index = faiss.IndexFlatIP(embeddings.shape[1])  # exact; cosines, as the embeddings are of length 1
    index.add(np.ascontiguousarray(embeddings))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.json").unlink(missing_ok=True)  # written last: it says that the index is whole
    stored, items = faiss.serialize_index(index).tobytes(), json.dumps(collection.items)
    (folder / "index.faiss").write_bytes(stored)
    save_encoders(folder / "encoders.pt", model)
    content = {"sha256": digest([stored, items]), "items": collection.items}
    (folder / "items.json").write_text(json.dumps(content), encoding="utf-8")
    return collection.left_out
