"""The instrument of benchmarks/evidence: statistics, store, splits, and a tiny run from search to tables."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.evidence import collapse, effects, families, read_test, store, synthetic, tables
from benchmarks.evidence.__main__ import best_settings, draw_settings, label, run
from benchmarks.evidence.encoders import Pair
from benchmarks.evidence.graph_quality import measure, percentile_of_own
from benchmarks.evidence.loaded import load
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.statistics import paired, summarize, t_cdf, t_quantile
from benchmarks.evidence.training import evaluate, make_batches

TINY = {"sizes": (80, 40, 40), "regions": 5, "dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    synthetic.write(path, **TINY)
    return path


@pytest.fixture(scope="module")
def data(folder):
    return load(folder, 1)


# ---------------------------------------------------------------- statistics
@pytest.mark.parametrize(
    ("p", "df", "expected"), [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 7, 2.36462), (0.8, 7, 0.89603)]
)
def test_t_quantile_is_that_of_the_printed_tables(p, df, expected):
    assert t_quantile(p, df) == pytest.approx(expected, rel=1e-5)
    assert t_quantile(1 - p, df) == pytest.approx(-expected, rel=1e-5)


def test_t_cdf_is_cauchys_for_one_degree_of_freedom():
    for t in (-3.0, -0.1, 0.0, 2.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi)


def test_paired_difference_by_hand():
    d = paired([3.0, 5.0, 10.0], [1.0, 2.0, 6.0])  # differences 2, 3, 4: mean 3, sd 1
    assert d.mean == pytest.approx(3)
    assert d.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert d.detectable == pytest.approx((4.30265 + 1.06066) / math.sqrt(3), rel=1e-5)


def test_single_values_have_no_interval():
    assert math.isnan(summarize([1.0]).error)
    assert math.isnan(paired([1.0], [0.0]).half)
    with pytest.raises(ValueError, match="at least one"):
        summarize([])
    with pytest.raises(ValueError, match="equal lengths"):
        paired([1.0], [])


# ---------------------------------------------------------------- store
def line(**changes):
    values = {
        "data": "d", "row": "base", "seed": 1, "split": "dev", "metrics": dict.fromkeys(store.METRICS, 1.0),
        "settings": {"lr": 0.1}, "seconds": 2.0, "commit": "abc",
    }  # fmt: skip
    return store.Line(**{**values, **changes})


def test_lines_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "r.csv"
    store.append(path, [line(seconds=0.012)])  # of a quick machine: not 0
    store.append(path, [line(seed=2, settings={"a": [1, "x,y"]})])
    assert store.read(path) == [line(seconds=0.012), line(seed=2, settings={"a": [1, "x,y"]})]
    assert tuple(path.read_text().splitlines()[0].split(",")) == store.COLUMNS


def test_unfinished_last_line_is_dropped_and_overwritten(tmp_path):
    path = tmp_path / "r.csv"
    store.append(path, [line()])
    with path.open("a") as file:
        file.write("d,base,2,dev,1.0,")
    assert store.read(path) == [line()]
    store.append(path, [line(seed=3)])
    assert [x.seed for x in store.read(path)] == [1, 3]


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns data,row"):
        store.read(path)


# ---------------------------------------------------------------- splits
def test_families_are_connected_over_stems_captions_and_pictures():
    features = np.random.default_rng(0).standard_normal((6, 64))
    features[4] = features[5] + 1e-3
    got = families.group(["a", "a", "b", "c", "d", "e"], [["x"], ["y"], ["q p"], ["p q"], ["r"], ["s"]], features)
    assert got[0] == got[1] and got[2] == got[3] and got[4] == got[5]
    assert len(set(got.tolist())) == 3


def test_split_keeps_families_whole_and_its_file_is_checked(tmp_path):
    random = np.random.default_rng(0)
    group = random.integers(200, size=600)
    splits = families.split(group, dev=60, test=120)
    for family in set(group.tolist()):
        assert len(set(splits[group == family].tolist())) == 1
    assert 120 <= (splits == "test").sum() <= 135 and 60 <= (splits == "dev").sum() <= 75
    names = [f"n{i}" for i in range(600)]
    families.write(tmp_path / "s.txt", names, splits)
    assert (families.read(tmp_path / "s.txt", names) == splits).all()
    with pytest.raises(ValueError, match="sha256"):
        families.read(tmp_path / "s.txt", [*names[:-1], "another"])


def test_pictures_that_were_read_never_come_to_test(tmp_path):
    random = np.random.default_rng(0)
    group = random.integers(200, size=600)
    names = [f"n{i}" for i in range(600)]
    assert families.read_before(names, tmp_path / "none.txt") is None
    (tmp_path / "read.txt").write_text("\n".join(names[:150]) + "\n")
    read = families.read_before(names, tmp_path / "read.txt")
    assert read.tolist() == [i < 150 for i in range(600)]
    splits = families.split(group, dev=60, test=120, read=read)
    touched = np.isin(group, group[read])
    assert not (splits[touched] == "test").any() and touched[splits == "dev"].all()
    assert (splits == "test").sum() >= 120 and (splits == "dev").sum() >= 60


def test_icons_of_the_test_split_were_not_read_before():
    held = [row.split("\t") for row in (families.SPLITS / "icons.txt").read_text().splitlines()[1:]]
    test = {name for split, name in held if split == "test"}
    read = set((families.SPLITS / "read" / "icons.txt").read_text().splitlines())
    first = {row.split("\t")[1] for row in (families.SPLITS / "icons_split1.txt").read_text().splitlines()[1:]}
    assert first <= read and len(test) >= 1000 and not test & read


@pytest.mark.parametrize("path", sorted(families.SPLITS.glob("*.txt")), ids=lambda p: p.stem)
def test_split_files_of_the_repository_are_sound(path):
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# sha256 ")
    splits, names = zip(*(row.split("\t") for row in rest), strict=True)
    assert set(splits) == {"dev", "test"} and len(set(names)) == len(names)


# ---------------------------------------------------------------- data and batches
def test_noise_moves_the_asked_share_of_training_captions_and_no_others(folder, data):
    noisy = load(folder, 1, noise=0.5)
    moved = (noisy.train.tokens != data.train.tokens).any(dim=1)
    assert 35 <= moved.sum() <= 40  # of 80; equal captions may change places
    assert sorted(noisy.train.tokens.tolist()) == sorted(data.train.tokens.tolist())
    assert torch.equal(noisy.test.tokens, data.test.tokens)


def test_share_keeps_images_with_their_captions(folder, data):
    few = load(folder, 1, share=0.25)
    assert len(few.train.images) == len(few.train.tokens) == 20
    assert torch.equal(few.train.owner, torch.arange(20))
    whole = {tuple(t) for t in data.train.tokens.tolist()}
    assert {tuple(t) for t in few.train.tokens.tolist()} <= whole


@pytest.mark.parametrize("row", ["base", "base_large_batch", "neighbors_all", "neighbors_half"])
def test_rows_see_as_many_samples_and_no_image_twice_in_a_batch(data, row):
    settings = {"batch": 8, "images_per_cluster": 4}
    batches = list(make_batches(data.train, ROWS[row], settings, seed=0, epochs=4))
    assert {len(b) for b in batches} == {8 * ROWS[row].batch_factor}
    assert all(len(set(data.train.owner[b].tolist())) == len(b) for b in batches)
    assert 256 <= sum(map(len, batches)) <= 320


def test_evaluation_knows_a_perfect_model():
    v = torch.eye(12)
    got = evaluate(v, v.repeat_interleave(2, dim=0), torch.arange(24) // 2)
    assert tuple(got) == store.METRICS and set(got.values()) == {600.0, 100.0}


def test_settings_are_the_same_for_everyone():
    assert draw_settings(3) == draw_settings(3) != draw_settings(4)


def test_best_settings_have_the_highest_mean_over_the_searchs_seeds():
    def tried(lr, *totals, epochs=8):
        settings = {"lr": lr, "epochs": epochs}
        return [
            line(split="search", seed=1000 + i, metrics={"rsum": x}, settings=settings) for i, x in enumerate(totals)
        ]

    lines = [*tried(0.1, 30, 10, 11), *tried(0.2, 20, 21, 19), *tried(0.3, 99, epochs=16), *tried(0.4, 90)]
    assert best_settings(lines, "d", "base", 8) == {"lr": 0.2}  # one seed of 0.4 is not three
    assert best_settings(lines, "d", "base", 16) == {"lr": 0.3}


def test_label_names_the_regime():
    assert label("icons", noise=0.4, share=1) == "icons+noise40"
    assert label("icons", noise=0, share=0.25) == "icons+share25"
    assert label("icons", noise=0, share=1, epochs=16) == "icons+epochs16"
    assert tables.describe("icons+share25+epochs16") == "icons, 25% of the training images, 16 epochs"


# ---------------------------------------------------------------- the whole way
def test_run_is_resumed_read_once_and_tabled(tmp_path, data, monkeypatch):
    results, readings = tmp_path / "results.csv", tmp_path / "readings.csv"
    monkeypatch.setattr("benchmarks.evidence.__main__.draw_settings", lambda n: {**draw_settings(n), "batch": 16})
    options = {"seeds": 2, "budget": 2, "epochs": 2, "results": results, "cache": tmp_path}
    rows = ["base", "relations"]
    run(data, "tiny", rows, **options)
    lines = store.read(results)
    assert len(lines) == 2 * (2 + 2)
    run(data, "tiny", rows, **options)
    assert store.read(results) == lines  # nothing is trained twice

    # the training that was lost comes again, and gives the same
    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:-1]))
    run(data, "tiny", rows, **options)
    again = store.read(results)
    assert [x.key for x in again] == [x.key for x in lines] and again[-1].metrics == lines[-1].metrics

    chosen = {x.row: x.settings for x in lines if x.split == "dev"}
    for row in rows:
        best = max((x for x in lines if (x.row, x.split) == (row, "search")), key=lambda x: x.metrics["rsum"])
        assert chosen[row] == best.settings
        read_test.read_row(data, "tiny", row, results=results, readings=readings, cache=tmp_path)
        with pytest.raises(RuntimeError, match="once is all"):
            read_test.read_row(data, "tiny", row, results=results, readings=readings, cache=tmp_path)
    with readings.open() as file:
        assert [(r["row"], r["seeds"]) for r in csv.DictReader(file)] == [("base", "1 2"), ("relations", "1 2")]

    tables.main(["--results", str(results), "--docs", str(tmp_path)])
    page = (tmp_path / "results.md").read_text()
    d = tables.difference(store.read(results), "tiny", "relations", "test")
    assert f"{d.mean:+.1f} ± {d.half:.1f}" in page
    assert "| `base` | 2 |" in page and "near" in page and (tmp_path / "results.svg").stat().st_size > 0


def test_combined_difference_by_hand():
    def lines(data, row, totals):
        return [
            line(data=data, row=row, seed=i, split="test", metrics=dict.fromkeys(store.METRICS, float(x)))
            for i, x in enumerate(totals)
        ]

    found = [
        *lines("icons", "base", [10, 20, 30]), *lines("icons", "recipe", [12, 23, 34]),  # 2, 3, 4
        *lines("stamps", "base", [5, 5]), *lines("stamps", "recipe", [9, 10]),  # 4, 5
        *lines("icons_split1", "base", [0, 0]), *lines("icons_split1", "recipe", [90, 90]),
    ]  # fmt: skip
    sets, d = effects.combined(found, "recipe", "base", "test")
    assert sets == ["icons", "stamps"] and (d.n, d.mean) == (2, 3.5)  # 3 and 4
    assert effects.combined(found, "base_infonce", "base", "test") is None
    assert "+3.5" in effects.effects_section(found)


def test_difference_at_equal_settings_by_hand():
    def tried(row, lr, seed, total):
        return line(row=row, split="search", seed=seed, settings={"lr": lr}, metrics={"rsum": float(total)})

    found = [
        tried("base", 1, 1000, 10), tried("base", 1, 1001, 20), tried("base", 2, 1000, 5), tried("base", 3, 1000, 0),
        tried("relations_gated", 1, 1000, 11), tried("relations_gated", 1, 1001, 23),
        tried("relations_gated", 2, 1000, 10),
    ]  # fmt: skip
    d = effects.at_equal_settings(found, "d", "relations_gated", "base")
    assert (d.n, d.mean) == (3, 3.0)  # 1, 3, 5
    assert f"| d | +3.0 ± {d.half:.1f} (3) |" in effects.equal_settings_section(found)
    assert effects.equal_settings_section(found[:4]) == ""


def test_missing_weights_and_rows_are_named(tmp_path, data):
    where = {"results": tmp_path / "r.csv", "readings": tmp_path / "x.csv", "cache": tmp_path}
    with pytest.raises(RuntimeError, match="expected trainings"):
        read_test.read_row(data, "tiny", "base", **where)
    store.append(where["results"], [line(data="tiny")])
    with pytest.raises(RuntimeError, match="expected the weights"):
        read_test.read_row(data, "tiny", "base", **where)


def test_subset_of_everything_is_the_whole():
    torch.manual_seed(0)
    v, u, owner = torch.randn(12, 4), torch.randn(24, 4), torch.arange(24) // 2
    everyone = torch.ones(12, dtype=torch.bool), torch.ones(24, dtype=torch.bool)
    assert read_test.evaluate_subset(v, u, owner, *everyone) == pytest.approx(evaluate(v, u, owner))


def test_percentile_of_own():
    p = torch.tensor([[2.0, 1.0, 0.0], [3.0, 3.0, 0.0], [1.0, 1.0, 0.0]])
    assert percentile_of_own(p) == pytest.approx((2 + 1.5 + 0) / 6)


def test_graph_quality_of_pairs_that_share_their_fragments(data, monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.graph_quality.BATCH", 20)
    torch.manual_seed(0)
    found = measure(Pair(data, 0.0), data.dev, "cosine")
    assert all(-1 <= x <= 1 for x in found.values()) and json.dumps(found)


@pytest.mark.parametrize("start", ["base", "again", "library", "residual", "gate_tenth", "centred", "zero", "tenth"])
def test_every_start_of_the_study_of_collapse_trains(data, start):
    got = collapse.train_start(data, start, "hardest-mean", lr=1e-3, clip=2, seed=0, steps=2, batch=16)
    assert 0 <= got["rsum"] <= 600 and math.isnan(got["cosine"]) == (start in ("base", "again"))


def test_starts_of_a_seed_see_the_same_batches(data, monkeypatch):
    seen = {}
    for start in ("base", "again", "library"):
        batches = seen.setdefault(start, [])

        class Watched(Pair):
            def forward(self, images, tokens, batches=batches):
                batches.append(images.sum().item())
                return super().forward(images, tokens)

        monkeypatch.setattr(collapse, "Pair", Watched)
        collapse.train_start(data, start, "hardest-mean", lr=1e-3, clip=0, seed=3, steps=7, batch=16)
    assert len(set(seen["base"])) > 1 and seen["base"] == seen["again"] == seen["library"]


def grid(tmp_path, folder, *more):
    out = tmp_path / "c.csv"
    collapse.main(
        ["--data", str(folder), "--pairs", "hardest-mean", "infonce", "--lrs", "1e-3", "--seeds", "0", "--steps", "2",
         "--batch", "16", "--out", str(out), *more]
    )  # fmt: skip
    return list(csv.DictReader(out.read_text().splitlines()))


def test_grid_of_collapse_is_resumed_and_repeats_no_training_that_nothing_was_clipped_in(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(collapse, "load", lambda path, captions: load(path, 1))
    lines = grid(tmp_path, folder)
    assert len(lines) == 8 and len({tuple(x[k] for k in collapse.KEY) for x in lines}) == 8
    for x in lines:
        assert (x["seconds"] == "0") == (x["clip"] == "2" and float(x["norm"]) < 1.98)
    with (tmp_path / "c.csv").open("a") as file:
        file.write("half a li")
    assert grid(tmp_path, folder) == lines


def test_copied_line_is_what_the_training_with_clipping_gives(data):
    free, clipped = (
        collapse.train_start(data, "library", "hardest-mean", lr=1e-3, clip=clip, seed=0, steps=3, batch=16)
        for clip in (0, 1e6)
    )
    assert free == clipped


def test_summary_of_collapse_by_hand(capsys, tmp_path):
    def lines(start, totals, lr="0.001"):
        values = dict.fromkeys(collapse.COLUMNS, "0") | {"data": "d", "pair": "infonce", "lr": lr, "start": start}
        return [values | {"seed": str(i), "rsum": str(x)} for i, x in enumerate(totals)]

    found = [*lines("base", [100, 200]), *lines("library", [90, 220]), *lines("library", [1], lr="0.1")]
    assert collapse.ratios(found, "d", "library") == {("infonce", "0.001", "0", "0"): [0.9, 1.1]}
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in collapse.summary(found)[2:]]
    assert rows[0] == ["d", "0", "`library`", "0.001", "1", "2", "1.000", "1.000", "0", "1", "0.900"]
    assert rows[1] == ["d", "0", "`library`", "all", *rows[0][4:]] and len(rows) == 2
