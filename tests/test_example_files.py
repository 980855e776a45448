"""The files that the example reads as people really have them: encodings, line ends, dtypes, word vectors, workers."""

from __future__ import annotations

import gzip
import io
import re
import zipfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import Features, read_captions, read_integers
from pair_data import DataError, Images, Pairs, TrainingPairs, collate, load_pairs
from precomputed import OwnMemory, write_folder
from text_tokens import BertTokens, Vocabulary
from torch.utils.data import DataLoader
from word_vectors import read_word_vectors, say_found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", train=8, dev=4, test=4)


# ---------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\u0085", "\f", "\v", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_line_ends_end_captions(tmp_path: Path, inside: str) -> None:
    for end in ("\n", "\r\n"):
        (tmp_path / "c.txt").write_bytes(f"a{inside}dog{end}a cat{end}".encode())
        assert read_captions(tmp_path / "c.txt") == [f"a{inside}dog", "a cat"]


def test_a_byte_order_mark_is_no_caption_and_the_last_end_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfa dog\na cat")
    assert read_captions(tmp_path / "c.txt") == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a dog\na café\n".encode("latin-1"), "expected text in UTF-8, found byte 0xe9 in line 2"),
        ("a dog\n".encode("utf-16"), "expected text in UTF-8, found byte 0xff in line 1"),
        ("a dog\n".encode("utf-16-le"), "expected text in UTF-8, found a zero byte in line 1"),
        (b"\x80\x04\x95", "expected text in UTF-8, found byte 0x80 in line 1"),
        (b"a dog\n\na cat\n", "expected a caption on every line, found an empty line 2 of 3"),
        (b"a dog\n \t\na cat\n", "found an empty line 2 of 3"),
        (b"a dog\n\n", "found an empty line 2 of 2"),
    ],
)
def test_what_is_no_captions_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"c\.txt: .*{message}"):
        read_captions(tmp_path / "c.txt")


@pytest.mark.parametrize("odd", ["123.jpg#0\ta dog", "123.jpg#0 a dog", "COCO_1.png a dog", "1.gif a dog", "7\ta dog"])
def test_captions_that_carry_a_table_along_are_warned_of(
    tmp_path: Path, odd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").write_text(f"a cat\n{odd}\n{odd}\n")
    assert len(read_captions(tmp_path / "c.txt")) == 3
    assert re.fullmatch(
        r"warning: \S+c\.txt: 2 of 3 lines hold a tab or begin with a file name, line 2 .*\n", capsys.readouterr().err
    )


def test_usual_captions_are_not(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_pairs(data, "train")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_features_of_any_float_type_and_order(tmp_path: Path, dtype: str, order: str) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 5))
    np.save(tmp_path / "f.npy", np.array(x, dtype=dtype, order=order))  # type: ignore[call-overload]
    features = Features(tmp_path / "f.npy")
    for i in range(4):
        row = features.row(i)
        assert row.dtype == np.float32 and row.dtype.isnative and row.flags.c_contiguous
        np.testing.assert_array_equal(row, x[i].astype(dtype).astype(np.float32))
        torch.from_numpy(row)


def test_one_vector_per_image_is_one_region(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.arange(12.0).reshape(4, 3))
    features = Features(tmp_path / "f.npy")
    assert features.shape == (4, 1, 3) and features.row(2).tolist() == [[6, 7, 8]]


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, features=np.zeros((4, 3, 5), np.float32))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_npz, r"found an \.npz archive of features; np\.save the array itself"),
        (lambda p: p.write_bytes(b""), "found an empty file"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), "a file that NumPy cannot open"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((((\n"), "a file that NumPy cannot open"),
        (lambda p: p.write_text("1 2 3"), "a file that NumPy cannot open"),
        (lambda p: np.save(p, np.array([{}], dtype=object)), "a file that NumPy cannot open"),
        (lambda p: np.save(p, np.zeros((4, 3, 5), np.uint8)), r"found uint8 .*\.astype\(np\.float32\)"),
        (lambda p: np.save(p, np.zeros((4, 3, 5), bool)), r"found bool .*\.astype\(np\.float32\)"),
        (lambda p: np.save(p, np.zeros((4, 3, 5), complex)), r"found complex128 .*\.astype\(np\.float32\)"),
        (lambda p: np.save(p, np.zeros((4, 7, 7, 5), np.float32)), r"found float32 \(4, 7, 7, 5\).*\.reshape\("),
        (lambda p: np.save(p, np.float32(3)), r"found float32 \(\)"),
        (lambda p: np.save(p, np.zeros((0, 3, 5), np.float32)), r"found float32 \(0, 3, 5\)"),
    ],
)
def test_what_are_no_features_is_named(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "train_ims.npy"
    write(path)
    with pytest.raises(DataError, match=rf"train_ims\.npy: expected .*{message}"):
        Features(path)


def test_numbers_too_large_for_float32_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.array([[[1.0]], [[1e300]]]))
    with pytest.raises(DataError, match=r"f\.npy: expected finite features, found NaN or inf in row 1"):
        Features(tmp_path / "f.npy").row(1)


def test_dev_and_test_are_read_before_training(data: Path, tmp_path: Path) -> None:
    flickr30k = pytest.importorskip("flickr30k")
    from example_runs import command

    features = np.load(data / "test_ims.npy")
    features[2, 1, 0] = np.nan
    np.save(data / "test_ims.npy", features)
    with pytest.raises(
        SystemExit, match=r"error: \S+test_ims\.npy: expected finite features, found NaN or inf in row 2"
    ):
        flickr30k.main(command(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (b"", "found an empty file"),
        (np.zeros(7, int), r"integers of shape \(8,\).*found int64 \(7,\)"),
        (np.zeros(8), r"found float64 \(8,\)"),
        (np.array(["a"] * 8), r"found <U1 \(8,\)"),
        (np.full(8, 2**64 - 1, np.uint64), "above the largest"),
    ],
)
def test_ids_that_do_not_fit_are_named(tmp_path: Path, ids: bytes | np.ndarray, message: str) -> None:
    path = tmp_path / "train_ids.npy"
    path.write_bytes(ids) if isinstance(ids, bytes) else np.save(path, ids)
    with pytest.raises(DataError, match=rf"train_ids\.npy: expected .*{message}"):
        read_integers(path, 8, "an id per image")


@pytest.mark.parametrize("name", ["train_ids.npy", "train_lengths.npy", "train_long.txt"])
def test_what_may_be_missing_is_not_passed_over_if_it_is_there(data: Path, name: str) -> None:
    (data / name).symlink_to(data / "gone")
    with pytest.raises(DataError, match=rf"{name}: expected a file, found none"):
        load_pairs(data, "train", lists=("caps", "long"))


def test_only_so_many_regions_as_the_lengths_say(data: Path) -> None:
    lengths = np.array([1, 2, 3, 4, 5, 6, 6, 6], dtype=">i2")
    np.save(data / "train_lengths.npy", lengths)
    pairs = load_pairs(data, "train")
    assert [len(pairs.image(i)) for i in range(8)] == lengths.tolist()
    for wrong in (0, 7):
        np.save(data / "train_lengths.npy", np.where(lengths == 3, wrong, lengths))
        with pytest.raises(DataError, match=r"train_lengths\.npy: expected numbers of regions from 1 to 6"):
            load_pairs(data, "train")


# ---------------------------------------------------------------------------------------- workers


def pickled_size(value: object) -> int:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(value)
    return buffer.getbuffer().nbytes


def large(folder: Path) -> Pairs:
    """2,000 images of 40 x 2048 features, 655 MB; the file is sparse."""
    np.lib.format.open_memmap(folder / "train_ims.npy", "w+", dtype=np.float32, shape=(2000, 40, 2048)).flush()
    (folder / "train_caps.txt").write_text("a dog\n" * 10000)
    return load_pairs(folder, "train")


def test_features_travel_as_their_path(tmp_path: Path) -> None:
    pairs = large(tmp_path)
    vocabulary = Vocabulary(["dog"], augment=0.0)
    assert pickled_size(pairs.features) < 1000
    assert pickled_size(Images(pairs)) < 2**20
    assert pickled_size(TrainingPairs(pairs, vocabulary, region_drop=0.0, seed=0)) < 2**20


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_read_the_file_themselves(data: Path, context: str) -> None:
    pairs = load_pairs(data, "train")
    dataset = TrainingPairs(pairs, Vocabulary(["a"], augment=0.0), region_drop=0.3, seed=0)
    batches = [[0, 15, 3], [7, 8, 9]]
    options = {"batch_sampler": batches, "collate_fn": collate}
    for here, there in zip(
        DataLoader(dataset, **options),
        DataLoader(dataset, num_workers=1, multiprocessing_context=context, **options),
        strict=True,
    ):
        assert all(torch.equal(x, y) for x, y in zip(here, there, strict=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_spawned_worker_does_not_hold_the_features(tmp_path: Path) -> None:
    dataset = OwnMemory(Images(large(tmp_path)))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert max(loader) < 500 * 2**20  # Python and PyTorch take some 200 MB


def test_a_file_that_changed_meanwhile_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.zeros((4, 3, 5), np.float32))
    pickled = ForkingPickler.dumps(Features(tmp_path / "f.npy"))
    np.save(tmp_path / "f.npy", np.zeros((4, 2, 5), np.float32))
    with pytest.raises(DataError, match=r"f\.npy: .*the file was changed meanwhile"):
        ForkingPickler.loads(pickled)


# ---------------------------------------------------------------------------------------- word vectors


def vectors_of(path: Path, wanted: list[str] | None = None) -> dict[str, list[float]]:
    return {word: vector.tolist() for word, vector in read_word_vectors(path, wanted).items()}


@pytest.mark.parametrize(
    "content",
    [
        "dog 1 2 3\ncat 4 5 6\n",
        "dog 1 2 3\ncat 4 5 6",
        "dog 1 2 3\r\ncat 4 5 6\r\n",
        "dog 1 2 3 \ncat 4 5 6 \n\n",
        "2 3\ndog 1 2 3 \ncat 4 5 6 \n",
        "\ufeffdog 1 2 3\ncat 4 5 6\n",
        "\ufeff2 3\ndog 1 2 3\ncat 4 5 6\n",
        "dog\t1\t2\t3\ncat 4\t5 6\n",
        "dog 1 2 3\ncat 4 5 6\ncat 7 8 9\n",
        " dog 1 2 3\n cat 4 5 6\n",
        "\n2 3\ndog 1 2 3\ncat 4 5 6\n",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_as_programs_write_it(tmp_path: Path, content: str, packed: bool) -> None:
    path = tmp_path / "v.vec"  # what is packed is known by its content
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert vectors_of(path) == {"dog": [1, 2, 3], "cat": [4, 5, 6]}
    assert vectors_of(path, ["cat", "sky"]) == {"cat": [4, 5, 6]}


def test_words_with_spaces_numbers_and_odd_line_ends_inside(tmp_path: Path) -> None:
    words = [", ", "7", ". . .", "at name@domain.com", "a\u2028b", "\u0085x", "a\u00a0b", "1 2"]
    lines = [f"{word.strip(' ')} {i}.5 -2e-1 3" for i, word in enumerate(words)]
    (tmp_path / "v.txt").write_bytes(("\n".join([*lines, "\u00a0 1 2 3", "\u0085 1 2 3"]) + "\n").encode())
    assert [*vectors_of(tmp_path / "v.txt")] == [word.strip(" ") for word in words]
    assert vectors_of(tmp_path / "v.txt", ["7"]) == {"7": pytest.approx([1.5, -0.2, 3])}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("dog 1 2 3\ncat 4 nan 6\n", 2),
        ("dog 1 2 3\ncat 4 inf 6\n", 2),
        ("dog 1 2 3\ncat 4 1e300 6\n", 2),
        ("dog 1 2 3\n\ncat 4 5\n", 3),
        ("dog 1 2 3\ncat 4 5 x\n", 2),
        ("2 3\ndog 1 2\ncat 4 5\n", 2),
        ("dog\ncat\n", 1),
        ("dog 1\ncat 2\n", 1),
        ("dog 1.0 2.5 3\ncat 1.0 4 5 6\n", 2),
        ("d\0o\0g\0 \0001\0 \0002\n", 1),
    ],
)
def test_what_is_no_vector_is_named_by_file_and_line(tmp_path: Path, content: str, line: int) -> None:
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"v\.txt, line {line}: expected a word and \d finite numbers, found"):
        read_word_vectors(tmp_path / "v.txt", None)


def test_files_that_break_off(tmp_path: Path) -> None:
    packed = gzip.compress(b"dog 1 2 3\n" * 1000)
    for content in (packed[:-20], b"dog 1 2 3\n", packed[:40] + b"\0" * 40):
        (tmp_path / "v.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"v\.gz: expected a complete file of word vectors, found one that"):
            read_word_vectors(tmp_path / "v.gz", None)
    (tmp_path / "v.txt").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"v\.txt: expected a word and its numbers per line, found no line"):
        read_word_vectors(tmp_path / "v.txt", None)


def test_a_file_with_fewer_words_than_it_says_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.txt").write_text("400000 3\ndog 1 2 3\n")
    assert vectors_of(tmp_path / "v.txt") == {"dog": [1, 2, 3]}
    assert "line 1 speaks of 400000 words, there are 1" in capsys.readouterr().err


WORDS, VECTORS = np.array(["dog", "cat"]), np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"words": WORDS}, "expected an .npz of arrays 'words' and 'vectors': no vectors among"),
        (
            {"words": WORDS, "vectors": VECTORS[0]},
            r"'vectors': expected numbers of shape \(2, d\), found float32 \(3,\)",
        ),
        ({"words": WORDS, "vectors": VECTORS[:1]}, r"'vectors': expected numbers of shape \(2, d\)"),
        ({"words": WORDS, "vectors": VECTORS * np.nan}, "found NaN or inf in row 0"),
        ({"words": WORDS.astype(object), "vectors": VECTORS}, "Object arrays"),
        ({"words": WORDS, "vectors": VECTORS.astype(object)}, "Object arrays"),
        ({"words": WORDS[None], "vectors": VECTORS}, "'words': expected strings"),
        ({"words": np.arange(2), "vectors": VECTORS}, "'words': expected strings"),
    ],
)
def test_archives_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(ValueError, match=rf"v\.npz: .*{message}"):
        read_word_vectors(tmp_path / "v.npz", None)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half an archive"])
def test_a_damaged_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.npz: expected an \.npz of arrays"):
        read_word_vectors(tmp_path / "v.npz", None)


def test_an_array_or_a_damaged_header_under_the_name_of_an_archive(tmp_path: Path) -> None:
    with (tmp_path / "v.npz").open("wb") as file:
        np.save(file, VECTORS)
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        for name in ("words", "vectors"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((((\n")
    for name in ("v.npz", "w.npz"):
        with pytest.raises(ValueError, match=rf"{name}: expected an \.npz of arrays"):
            read_word_vectors(tmp_path / name, None)


def test_how_many_words_have_a_vector_is_said_and_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say_found(tmp_path / "v.txt", {"dog": 1, "sky": 2}, ["a", "dog", "cat"])
    assert capsys.readouterr().out == f"word vectors: 1 of 3 words found in {tmp_path / 'v.txt'}\n"
    with pytest.raises(ValueError, match=r"v\.txt: found none of the 3 words of the training captions"):
        say_found(tmp_path / "v.txt", {"DOG": 1}, ["a", "dog", "cat"])


# ---------------------------------------------------------------------------------------- BERT's positions


class Letters:
    """A tokenizer that makes a piece of each letter."""

    cls_token_id, sep_token_id, unk_token_id, mask_token_id = 1, 2, 3, 4

    def encode(self, word: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in word]

    def __len__(self) -> int:
        return 200


def test_captions_longer_than_the_positions_are_cut_and_counted() -> None:
    encode = BertTokens(Letters(), augment=0.0, longest=8)
    captions = ["a dog", "a dog and", "a dog and a cat", "x" * 6, "x" * 7]
    assert [len(encode(caption, None)) for caption in captions] == [6, 8, 8, 8, 8]
    assert all(encode(caption, None)[::7] in ([1], [1, 2]) for caption in captions)
    assert encode.count_too_long(captions) == 3
    random = np.random.default_rng(0)
    changed = BertTokens(Letters(), augment=0.5, longest=8)
    assert max(len(changed("a dog and a cat and a horse", random)) for _ in range(50)) == 8
    assert BertTokens(Letters(), augment=0.0).count_too_long(captions) == 0
