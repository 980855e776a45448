"""The example's data and encoders: what does not fit is named, nothing is loaded whole, padding changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import BiGRUEncoder, ImageEncoder, MaskedBatchNorm
from pair_data import DataError, TrainingPairs, collate, load_pairs
from precomputed import write_folder
from text_tokens import UNKNOWN, Vocabulary, augment_words, words
from torch.utils.data import DataLoader
from word_vectors import read_word_vectors

from hrem_layers import FragmentRelation

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", train=8, dev=4, test=4)


def test_features_stay_on_disk(data: Path) -> None:
    pairs = load_pairs(data, "train")
    assert isinstance(pairs.features.array, np.memmap)
    assert pairs.num_images == 8 and len(pairs.captions) == 40


def test_repeated_rows_are_read_once_per_image(data: Path) -> None:
    rows, pairs = np.load(data / "dev_ims.npy"), load_pairs(data, "dev")
    assert len(rows) == 20 and pairs.num_images == 4
    for i in range(4):
        np.testing.assert_array_equal(pairs.image(i), rows[5 * i])


def _empty_caption(folder: Path) -> None:
    lines = (folder / "train_caps.txt").read_text().splitlines()
    lines[6] = "  "
    (folder / "train_caps.txt").write_text("\n".join(lines))


def _truncate(folder: Path) -> None:
    whole = (folder / "train_ims.npy").read_bytes()
    (folder / "train_ims.npy").write_bytes(whole[: len(whole) // 2])


def _different_rows(folder: Path) -> None:
    np.save(folder / "train_ims.npy", np.random.default_rng(0).normal(size=(40, 6, 24)).astype(np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train_ims.npy").unlink(), r"train_ims\.npy: expected a file, found none; .* holds dev_caps"),
        (lambda f: (f / "train_caps.txt").unlink(), r"train_caps\.txt: expected a file, found none"),
        (_empty_caption, r"train_caps\.txt: expected a caption on every line, found an empty line 7 of 40"),
        (lambda f: (f / "train_caps.txt").write_text("a\n" * 39), "expected 5 captions per image.*found 39 lines"),
        (lambda f: (f / "train_caps.txt").write_text("a\n" * 45), "expected 9 rows .*or 45 .*found 8 rows"),
        (_truncate, r"train_ims\.npy: expected a complete \.npy array, found a file that NumPy cannot open"),
        (lambda f: np.save(f / "train_ims.npy", np.zeros((8, 2, 3, 24), np.float32)), r"found float32 .*\.reshape\("),
        (lambda f: np.save(f / "train_ims.npy", np.zeros(8, np.float32)), r"found float32 \(8,\)"),
        (lambda f: np.save(f / "train_ims.npy", np.zeros((8, 0, 24), np.float32)), r"found float32 \(8, 0, 24\)"),
        (lambda f: np.save(f / "train_ims.npy", np.zeros((8, 6, 24), int)), r"found int64 .*\.astype\(np\.float32\)"),
        (_different_rows, "expected every image 5 times in a row.*found different rows"),
    ],
)  # fmt: skip
def test_errors_name_the_file_what_was_expected_found_and_where_from(
    data: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(data)
    with pytest.raises(DataError, match=message) as error:
        load_pairs(data, "train")
    assert "github.com/kuanghuei/SCAN" in str(error.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_pairs(tmp_path / "nowhere", "train")


def test_nan_features_are_named_when_read(data: Path) -> None:
    features = np.load(data / "train_ims.npy")
    features[3, 2, 1] = np.nan
    np.save(data / "train_ims.npy", features)
    pairs = load_pairs(data, "train")
    with pytest.raises(DataError, match="NaN or inf in row 3"):
        pairs.image(3)


def test_a_workers_error_reaches_the_main_process_as_it_is(data: Path) -> None:
    features = np.load(data / "train_ims.npy")
    features[3] = np.inf
    np.save(data / "train_ims.npy", features)
    dataset = TrainingPairs(load_pairs(data, "train"), Vocabulary(["a"], augment=0.0), region_drop=0.0, seed=0)
    with pytest.raises(DataError, match=r"train_ims\.npy: expected finite features, found NaN or inf in row 3"):
        list(DataLoader(dataset, batch_sampler=[[0, 15]], collate_fn=collate, num_workers=1))


def test_training_items_depend_on_seed_epoch_and_index_only(data: Path) -> None:
    pairs = load_pairs(data, "train")
    vocabulary = Vocabulary.of(pairs.captions, min_count=1, augment=0.5)

    def items(seed: int, epoch: int, order: list[int]) -> dict[int, tuple]:
        dataset = TrainingPairs(pairs, vocabulary, region_drop=0.5, seed=seed)
        dataset.set_epoch(epoch)
        return {i: (dataset[i][0].tolist(), dataset[i][1].tolist()) for i in order}

    first = items(0, 0, list(range(40)))
    assert first == items(0, 0, list(range(40))[::-1])
    assert first != items(0, 1, list(range(40)))
    assert first != items(1, 0, list(range(40)))


def test_collate_pads_and_masks(data: Path) -> None:
    pairs = load_pairs(data, "train")
    dataset = TrainingPairs(pairs, Vocabulary.of(pairs.captions, min_count=1, augment=0.0), region_drop=0.4, seed=0)
    items = [dataset[i] for i in (0, 7, 21)]
    batch = collate(items)
    assert batch.image_ids.tolist() == [0, 1, 4]
    for row, (regions, tokens, _) in enumerate(items):
        torch.testing.assert_close(batch.images[row][batch.image_mask[row]], regions)
        torch.testing.assert_close(batch.tokens[row][batch.text_mask[row]], tokens)


def test_words_are_augmented_in_the_release_proportions() -> None:
    random = np.random.default_rng(0)
    outcome = {"kept": 0, "masked": 0, "replaced": 0, "deleted": 0}
    for _ in range(20000):
        ids = augment_words([[7], [8]], random, 0.2, mask=UNKNOWN, draw=lambda r: 99)
        changed = ids[: len(ids) - (8 in ids[-1:])]
        outcome[
            "deleted" if not changed else {7: "kept", UNKNOWN: "masked", 99: "replaced"}.get(changed[0], "deleted")
        ] += 1
    share = {name: count / 20000 for name, count in outcome.items()}
    assert share["kept"] == pytest.approx(0.8, abs=0.03)
    assert share["masked"] == pytest.approx(0.1, abs=0.03)
    assert share["replaced"] == pytest.approx(0.02, abs=0.01)


def test_a_caption_never_becomes_empty() -> None:
    random = np.random.default_rng(0)
    vocabulary = Vocabulary(["dog"], augment=0.999)
    assert all(vocabulary(caption, random) for caption in ["dog", "...", "cat"] * 200)


def test_vocabulary() -> None:
    assert words("A dog's BALL, here.") == ["a", "dog's", "ball", "here"]
    vocabulary = Vocabulary.of(["a dog", "a cat", "a bird"], min_count=2, augment=0.0)
    assert vocabulary.known == ["a"] and vocabulary("A dog", None) == [2, UNKNOWN]


def test_word_vectors_from_text_and_npz(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("2 3\ndog 1 2 3\ncat 4 5 6\n")
    np.savez(
        tmp_path / "v.npz",
        words=np.array(["dog", "cat"]),
        vectors=np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    )
    for name in ("v.txt", "v.npz"):
        assert {w: v.tolist() for w, v in read_word_vectors(tmp_path / name, ["cat", "sky"]).items()} == {
            "cat": [4, 5, 6]
        }
    (tmp_path / "bad.txt").write_text("dog 1 2 3\ncat 4 5\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 2: expected a word and 3 finite numbers"):
        read_word_vectors(tmp_path / "bad.txt", ["cat"])
    with pytest.raises(ValueError, match="found no file"):
        read_word_vectors(tmp_path / "none.txt", ["cat"])


@pytest.mark.parametrize("size", ["small", "odd"])
def test_image_encoder_computes_what_the_release_does(size: str) -> None:
    recorded = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / size / "fragment_relation.npz").items()}
    weights = {k.removeprefix("weights."): v for k, v in recorded.items() if k.startswith("weights.")}
    d = recorded["projected"].shape[2]
    relation = FragmentRelation(
        d,
        num_heads=int(recorded["num_heads"]),
        beta=float(recorded["beta"]),
        max_pool_k=int(recorded["max_pool_k"]),
    )
    relation.load_state_dict({k.removeprefix("aggr."): v for k, v in weights.items() if k.startswith("aggr.")})
    encoder = ImageEncoder(recorded["fragments_in"].shape[2], d, relation).eval()
    names = {
        "linear": "fc.fc", "mlp_in": "fc.mlp.layers.0", "mlp_out": "fc.mlp.layers.1", "norm": "fc.mlp.bns.0",
    }  # fmt: skip
    state = {
        key: weights[names[key.split(".")[0]] + "." + key.split(".")[1]]
        for key in encoder.state_dict() if not key.startswith("relation.")
    }  # fmt: skip
    encoder.load_state_dict(state, strict=False)
    mask = torch.arange(recorded["projected"].shape[1]) < recorded["lengths"].unsqueeze(1)
    embedding, regions = encoder(recorded["fragments_in"], mask)
    torch.testing.assert_close(regions, recorded["projected"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedding, recorded["embedding_raw"], rtol=1e-5, atol=1e-5)


def test_batch_norm_of_real_rows_is_batch_norm_without_padding() -> None:
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm(5), torch.nn.BatchNorm1d(5)
    x, mask = torch.randn(4, 6, 5), torch.rand(4, 6) < 0.6
    torch.testing.assert_close(ours(x, mask)[mask], theirs(x[mask]))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, mask)[mask], theirs(x[mask]))


def test_bigru_ignores_padding_and_starts_from_the_given_vectors() -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary(["dog", "cat"], augment=0.0)
    relation = FragmentRelation(8, num_heads=2).eval()
    encoder = BiGRUEncoder(vocabulary, 8, relation, vectors={"cat": np.arange(4, dtype=np.float32)}).eval()
    assert encoder.words.weight[3].tolist() == [0, 1, 2, 3]
    tokens, mask = torch.tensor([[2, 3], [3, 0]]), torch.tensor([[True, True], [True, False]])
    short, _ = encoder(tokens, mask)
    long, _ = encoder(torch.nn.functional.pad(tokens, (0, 3)), torch.nn.functional.pad(mask, (0, 3)))
    torch.testing.assert_close(short, long)


def test_messages_do_not_hide_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_pairs(tmp_path, "train")
    assert re.match(re.escape(str(tmp_path / "train_ims.npy")), str(error.value))


def test_images_with_equal_ids_are_positives(data: Path) -> None:
    np.save(data / "train_ids.npy", np.array([3, 3, 4, 4, 5, 5, 6, 6]))
    dataset = TrainingPairs(load_pairs(data, "train"), Vocabulary(["a"], augment=0.0), region_drop=0.0, seed=0)
    assert collate([dataset[i] for i in (0, 5, 10)]).image_ids.tolist() == [3, 3, 4]
    np.save(data / "train_ids.npy", np.zeros(7))
    with pytest.raises(DataError, match=r"train_ids\.npy: expected integers of shape \(8,\).*found float64 \(7,\)"):
        load_pairs(data, "train")
