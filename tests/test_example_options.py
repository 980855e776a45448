"""The example's options: each has a range, and what does not fit is said in one line with the option's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_runs import command
from precomputed import write_folder

for package in ("tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason='the script needs pip install "hrem-layers[examples]"')

import flickr30k  # noqa: E402
import options  # noqa: E402
from options import DEMO, RELEASE, check_saved, make_parser, parse_arguments  # noqa: E402
from run_folder import plain  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("precomputed"), train=16, dev=6, test=6)


HUGE = "9" * 20
NO_PATHS = ["", " ", "a" * 300, "a\0b", "~no-such-user/x"]
OUT_OF_RANGE = {
    **dict.fromkeys(["--data-dir", "--cache-dir", "--output-dir", "--word-vectors", "--init-from"], NO_PATHS),
    "--eval-only": NO_PATHS,
    "--resume": NO_PATHS[1:],
    "--captions-per-image": ["0", "-1", "x", "2.5", ""],
    "--test-split": ["", " ", "../test", "a/b", "a" * 300],
    "--captions": ["", " ", "../caps", "a/b"],
    "--text-encoder": ["lstm"],
    "--word-lr-factor": ["-0.1", "1e38", "nan", "inf"],
    "--vocabulary-min-count": ["0", "-3"],
    "--embed-dim": ["0", "-8", "1", "1e3", "1000000000"],
    "--num-heads": ["0", "-1", HUGE],
    "--dropout": ["-0.1", "1", "1.5", "nan", "x"],
    "--mechanism": ["both"],
    "--alignment": ["best"],
    "--pair-loss": ["hinge"],
    "--negatives": ["soft"],
    "--nonzero-cutoff": ["0", "0.5", "2.1", "-1", "nan"],
    "--candidates": ["0", "-1", HUGE],
    "--warmup-steps": ["-1", "nan", HUGE],
    "--epochs": ["0", "-1", "1.5"],
    "--batch-size": ["0", "1", "-32"],
    "--sampler": ["sorted"],
    "--images-per-cluster": ["0", "-1"],
    "--region-drop": ["-0.1", "1", "nan"],
    "--word-drop": ["-0.1", "1", "nan"],
    "--lr": ["0", "1e-320", "1e38", "-1e-3", "nan", "inf", "fast"],
    "--lr-steps": ["0", "-1", "x"],
    "--weight-decay": ["-1e-4", "nan", "inf"],
    "--grad-clip": ["-1", "nan", "inf"],
    "--seed": ["-1", "4294967296", "x"],
    "--device": ["nowhere", "cuda:99", "meta", ""],
    "--threads": ["0", "-1"],
    "--amp": ["fp8"],
    "--num-workers": ["-1", "x"],
    "--step-timeout": ["0", "-1", "nan", "1e9"],
    "--checkpoint-every": ["-1", "x"],
    "--log-every": ["-1", "x"],
}
NO_RANGE = {"--five-fold", "--save-embeddings", "--bert", "--open-vocabulary", "--help", "--residual"}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is printed."""
    with pytest.raises(SystemExit) as error:
        flickr30k.main(arguments)
    printed = capsys.readouterr().err.rstrip("\n")
    line = printed if error.value.code == 2 else str(error.value.code)
    assert line.startswith("error: ") and "\n" not in line, line
    return line


def test_every_option_has_a_range_or_none() -> None:
    names = {action.option_strings[0] for action in make_parser()._actions if action.dest != "help"} | {"--help"}
    assert names == OUT_OF_RANGE.keys() | NO_RANGE


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in OUT_OF_RANGE.items() for v in values])
def test_values_out_of_range_name_their_option(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([f"{option}={value}"], capsys)
    assert line.startswith(f"error: argument {option}: "), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--embed-dim", "36", "--num-heads", "16"], "must be even and a multiple of --num-heads 16, got 36"),
        (["--embed-dim", "3", "--num-heads", "1"], "--embed-dim must be even"),
        (["--sampler", "neighbor", "--images-per-cluster", "7"], "--images-per-cluster must divide the batch"),
        (["--resume"], "--resume needs a CHECKPOINT"),
        (["--resume", "nowhere.pt"], "--resume: no file nowhere.pt"),
        (["--eval-only", "nowhere.pt"], "--eval-only: no file nowhere.pt"),
        (["--eval-only"], "argument --eval-only: expected at least one argument"),
        (["--data-dir", "nowhere"], "--data-dir: no such folder nowhere"),
        (["--word-vectors", "nowhere.txt"], "--word-vectors: expected a file of word vectors, found no file"),
        (["--data-dir", ".", "--text-encoder", "bigru", "--open-vocabulary"], "--open-vocabulary needs --word-vectors"),
        (["--text-encoder", "bert", "--word-vectors", __file__], "--word-vectors: only --text-encoder bigru"),
        (["--text-encoder", "bert", "--bert", "./nowhere"], "--bert ./nowhere: expected a folder of transformers"),
        (["--text-encoder", "bert", "--bert", "."], r"--bert .: expected a folder with config.json"),
        (["--text-encoder", "bert", "--bert", "a" * 300], "File name too long"),
        (["--grad-clip", "1e-30"], "--grad-clip 1e-30: gradients as short vanish"),
        (["--lr", "0.1", "--weight-decay", "10"], "--weight-decay 10: times the learning rate 0.1 it must be below 1"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "100"], "--batch-size must be at most the number of training captions, 80, got 100"),
        (["--batch-size", "96", "--sampler", "neighbor"], "--batch-size must be at most"),
        (["--test-split", "testall"], "testall_ims.npy: expected a file, found none"),
        (["--captions", "caps", "caps"], "--captions caps caps: expected each name once"),
        (["--captions-per-image", "7"], "train_caps.txt: expected 7 captions per image"),
        (["--vocabulary-min-count", "10000"], "--vocabulary-min-count 10000: no word of the training captions"),
    ],
)
def test_what_the_data_do_not_allow_is_said_before_training(
    data: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(command(data, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("split", ["train", "dev"])
def test_the_final_evaluation_may_be_on_a_split_of_training(
    data: Path, tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flickr30k.main(command(data, tmp_path, "--epochs", "1", "--embed-dim", "8", "--test-split", split))
    assert f"\n{split}: {16 if split == 'train' else 6} images" in capsys.readouterr().out


def test_five_folds_of_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "data", train=16, dev=4, test=4)
    line = refused(command(data, tmp_path / "run", "--five-fold", "--save-embeddings"), capsys)
    assert "--five-fold: expected at least 5 images in the test split, found 4" in line


def test_a_damaged_bert_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    line = refused(command(data, tmp_path / "run", "--text-encoder", "bert", "--bert", str(tmp_path / "bert")), capsys)
    assert f"--bert {tmp_path / 'bert'}: expected a BERT of transformers, found none that loads" in line


def test_zero_switches_off(data: Path, tmp_path: Path) -> None:
    zeros = ("--grad-clip", "0", "--warmup-steps", "0", "--checkpoint-every", "0", "--log-every", "0", "--dropout", "0",
             "--weight-decay", "0", "--region-drop", "0", "--word-drop", "0", "--word-lr-factor", "0",
             "--lr", "0.003")  # fmt: skip
    flickr30k.main(command(data, tmp_path, "--epochs", "2", "--embed-dim", "8", *zeros))
    import checkpoint

    state = checkpoint.load(tmp_path / "last.pt")
    arguments = parse_arguments(command(data, tmp_path, "--embed-dim", "8", *zeros))
    import torch
    from pair_data import load_pairs
    from retrieval_model import build, known_words

    torch.manual_seed(0)
    built = build(arguments, 24, known_words(arguments, load_pairs(data, "train"), None))
    before = built.model.state_dict()
    changed = {name for name, x in state["model"].items() if not torch.equal(x, before[name])}
    assert "image_encoder.linear.weight" in changed  # without a limit on the gradient it still trains
    assert "text_encoder.words.weight" not in changed
    losses = [entry["loss"] for entry in state["history"]]
    assert losses[1] < losses[0]


def test_defaults_are_in_range_and_what_a_checkpoint_holds_is_checked() -> None:
    for given, defaults in ((["--data-dir", "."], RELEASE), ([], DEMO)):
        saved = plain(parse_arguments(given))
        assert saved.items() >= defaults.items()
        check_saved(saved)
    for name in saved.keys() - options.MAY_DIFFER:
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            check_saved({key: value for key, value in saved.items() if key != name})
        if name not in ("candidates", "word_vectors"):  # which may be None
            with pytest.raises(ValueError, match=name.replace("_", "-")):
                check_saved({**saved, name: None})
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            check_saved({**saved, name: object()})
