"""Files of the authors' release: read without running anything, mapped in full, evaluated and trained on.

No whole file of the release is recorded. The one made here has the recorded weights of the image encoder under the
release's names, a small BERT, and what stands around them in the dictionary that the release saves.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import command
from precomputed import write_folder
from support import SIZES, assert_near, golden
from torch import Tensor, nn
from torch.serialization import get_safe_globals, safe_globals

from hrem_layers import AssociationGraph, FragmentRelation, HREMLoss, RelationInteraction, TripletLoss
from hrem_layers.tools import compat, release


def recorded(size: str = "small") -> tuple[dict[str, Tensor], OrderedDict[str, Tensor]]:
    """Inputs and results, and the image encoder's weights by the release's names."""
    z = golden(size, "fragment_relation")
    return z, OrderedDict((k.removeprefix("weights."), x) for k, x in z.items() if k.startswith("weights."))


def contents(size: str = "small", *, bert: dict[str, Tensor] | None = None, width: int = 12) -> dict[str, Any]:
    z, image = recorded(size)
    dim = z["embedding"].shape[1]
    torch.manual_seed(1)
    language = {"embeddings.word_embeddings.weight": torch.randn(9, width)} if bert is None else bert
    text = OrderedDict((f"bert.{key}", x) for key, x in language.items())
    text["bert.embeddings.position_ids"] = torch.arange(8).unsqueeze(0)
    text["linear.weight"], text["linear.bias"] = torch.randn(dim, width) / 3, torch.randn(dim) / 3
    text |= {key: x + 0.1 * torch.randn_like(x) for key, x in image.items() if key.startswith("aggr.")}
    options = argparse.Namespace(
        embed_size=dim, img_dim=24, learning_rate=5e-4, lr_schedules=[15, 25], data_path="/data", nhead=4
    )
    return {"epoch": 7, "model": [image, text], "best_rsum": 531.5, "opt": options, "Eiters": 8000}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "model_best.pth", contents())


# ---------------------------------------------------------------------------------------- the settings


def test_the_settings_are_what_the_parts_take() -> None:
    loss = release.loss(32, interaction=release.interaction(32, num_heads=4))
    for module, section, cls in (
        (release.fragment_relation(32), "fragments", FragmentRelation),
        (loss.graph, "graph", AssociationGraph),
        (release.interaction(32), "interaction", RelationInteraction),
        (loss.pair_loss, "pair_loss", TripletLoss),
        (loss, "loss", HREMLoss),
    ):
        assert isinstance(module, cls)
        for name, value in release.SETTINGS[section].items():
            assert getattr(module, name) == value, name
    assert loss.interaction.num_heads == 4 and loss.interaction.residual is False
    assert release.loss(32, graph=None, pair_loss=None).graph.alignment == "scan"
    assert release.pair_loss(**release.COCO["pair_loss"]).nonzero_cutoff == 1.9


def test_the_settings_are_those_of_the_release() -> None:
    s = release.SETTINGS
    assert (s["graph"]["alignment"], s["graph"]["topk"], s["graph"]["neighbor_ratio"]) == ("scan", 10, 0.5)
    assert (s["graph"]["sigma"], s["graph"]["squared_distance"]) == (1.0, False)
    assert (s["fragments"]["num_heads"], s["fragments"]["beta"], s["fragments"]["max_pool_k"]) == (16, 0.8, 2)
    assert (s["interaction"]["mechanism"], s["interaction"]["residual"]) == ("fusion", False)
    assert (s["pair_loss"]["margin"], s["pair_loss"]["nonzero_cutoff"], s["pair_loss"]["reduction"]) == (
        0.2,
        1.7,
        "sum",
    )
    assert (s["loss"]["regularization_weight"], s["loss"]["warmup_steps"]) == (10.0, 8000)
    training = s["training"]
    assert (training["epochs"], training["batch_size"], training["embed_dim"]) == (30, 128, 1024)
    assert (training["lr"], training["lr_steps"], training["grad_clip"]) == (5e-4, (15, 25), 2.0)


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        release.SETTINGS["graph"]["topk"] = 3  # type: ignore[index]


def test_the_script_takes_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import retrieval_model
    from options import parse_arguments

    arguments = parse_arguments(["--data-dir", "."])
    for name, value in release.SETTINGS["training"].items():
        if hasattr(arguments, name):
            given = getattr(arguments, name)
            assert (tuple(given) if isinstance(given, list) else given) == value, name
    arguments.text_encoder = "bigru"
    built = retrieval_model.build(arguments, 8, retrieval_model.Words(["a", "b"], size=4))
    expected = release.loss(gather_distributed=True)
    assert repr(built.model.loss) == repr(expected)
    for module, reference in zip(built.model.loss.modules(), expected.modules(), strict=True):
        for name, value in vars(reference).items():
            if not name.startswith("_") and isinstance(value, (bool, int, float, str)):
                assert getattr(module, name) == value, (type(reference), name)
    assert repr(built.model.image_encoder.relation) == repr(release.fragment_relation())
    assert built.model.text_encoder.relation.max_pool_k == release.SETTINGS["fragments"]["max_pool_k"]
    slow = retrieval_model.make_optimizer(built.model, arguments)
    assert slow.defaults["weight_decay"] == release.SETTINGS["training"]["weight_decay"]


# ---------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("size", SIZES)
def test_image_embeddings_equal_the_recorded_ones(tmp_path: Path, size: str) -> None:
    from encoders import ImageEncoder

    z, _ = recorded(size)
    content = contents(size)
    content["opt"].nhead = int(z["num_heads"])
    read = compat.read_release_checkpoint(saved(tmp_path / "x.pth", content))
    mask = torch.arange(z["fragments_in"].shape[1]) < z["lengths"].unsqueeze(1)
    encoder = ImageEncoder(read.feature_dim, read.embed_dim, read.relation("image_encoder"))
    encoder.load_state_dict(read.image_encoder)  # strict: every key is one of the encoder's
    embedding, regions = encoder.eval()(z["fragments_in"], mask)
    assert_near(regions, z["projected"], 1e-5)
    assert_near(nn.functional.normalize(embedding), z["embedding"], 1e-5)
    pooled = read.relation("image_encoder")(z["projected"], mask)
    assert_near(pooled, z["embedding_raw"], 1e-5)
    assert (read.epoch, read.best_rsum, read.options["learning_rate"]) == (7, 531.5, 5e-4)


def test_every_key_goes_somewhere_or_changes_nothing(file: Path) -> None:
    read, content = compat.read_release_checkpoint(file), contents()
    dropped = {"fc.mlp.bns.0.num_batches_tracked", "bert.embeddings.position_ids"}
    for weights, found in zip(content["model"], (read.image_encoder, read.text_encoder), strict=True):
        kept = [x for key, x in weights.items() if key not in dropped and "bns.1" not in key]
        assert len(kept) == len(found)
        for x in kept:
            assert any(x.shape == y.shape and torch.equal(x, y) for y in found.values())


def test_the_second_batch_norm_is_left_out_because_it_does_nothing() -> None:
    """The recorded regions come out without it, although it would change them."""
    z, weights = recorded()
    x = z["fragments_in"]
    hidden = x @ weights["fc.mlp.layers.0.weight"].t() + weights["fc.mlp.layers.0.bias"]
    norm = nn.BatchNorm1d(hidden.shape[2]).eval()
    norm.load_state_dict({k.removeprefix("fc.mlp.bns.0."): v for k, v in weights.items() if "bns.0" in k})
    hidden = norm(hidden.flatten(0, 1)).view_as(hidden).relu()
    out = hidden @ weights["fc.mlp.layers.1.weight"].t() + weights["fc.mlp.layers.1.bias"]
    regions = x @ weights["fc.fc.weight"].t() + weights["fc.fc.bias"] + out
    assert_near(regions, z["projected"], 1e-5)


@pytest.mark.parametrize("new_zip", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "DataParallel"])
def test_forms_of_the_file(tmp_path: Path, new_zip: bool, wrapped: bool) -> None:
    content = contents()
    if wrapped:
        content["model"] = [OrderedDict((f"module.{k}", x) for k, x in part.items()) for part in content["model"]]
    path = saved(tmp_path / "x.pth", content, _use_new_zipfile_serialization=new_zip)
    assert compat.is_release_checkpoint(path)
    read = compat.read_release_checkpoint(path)
    assert torch.equal(read.image_encoder["linear.weight"], contents()["model"][0]["fc.fc.weight"])


@pytest.mark.parametrize("before", [False, True])
def test_what_may_be_loaded_elsewhere_is_as_before(file: Path, before: bool) -> None:
    with safe_globals([argparse.Namespace] if before else []):
        allowed = get_safe_globals()
        compat.read_release_checkpoint(file)
        assert set(get_safe_globals()) == set(allowed)
    if not before:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------- what is refused


class Evil:
    """Its pickle calls ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["instead", "in the options", "among the weights", "beside"])
@pytest.mark.parametrize("new_zip", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize(("function", "named"), [(os.mkdir, "mkdir"), (exec, "exec"), (getattr, "getattr")])
def test_nothing_in_the_file_is_executed(tmp_path: Path, place: str, new_zip: bool, function: Any, named: str) -> None:
    mark = tmp_path / "executed"
    arguments = {
        "mkdir": (str(mark),), "exec": (f"import os; os.mkdir({str(mark)!r})",), "getattr": (Path(mark), "mkdir"),
    }[named]  # fmt: skip
    evil, content = Evil(function, *arguments), contents()
    if place == "instead":
        content = evil  # type: ignore[assignment]
    elif place == "in the options":
        content["opt"].path = evil
    elif place == "among the weights":
        content["model"][0]["fc.fc.bias"] = evil
    else:
        content["more"] = evil
    path = saved(tmp_path / "evil.pth", content, _use_new_zipfile_serialization=new_zip)
    with pytest.raises(ValueError, match=named) as error:
        compat.read_release_checkpoint(path)
    assert str(path) in str(error.value) and not mark.exists()


def _put(content: dict[str, Any], part: int, key: str, value: Any) -> None:
    content["model"][part][key] = value


REFUSED = {
    "unknown: optimizer": lambda c: c.update(optimizer={}),
    "missing: opt": lambda c: c.pop("opt"),
    "missing: model": lambda c: c.pop("model"),
    "opt: an argparse.Namespace, found dict": lambda c: c.update(opt={}),
    "two state dicts, of the image and the text encoder, found 1": lambda c: c["model"].pop(),
    "best_rsum: a number, found str": lambda c: c.update(best_rsum="x"),
    r"model\[0\]: unknown: gpool.weight": lambda c: _put(c, 0, "gpool.weight", torch.ones(1)),
    r"model\[1\]: unknown: rnn.weight": lambda c: _put(c, 1, "rnn.weight", torch.ones(1)),
    r"model\[0\].* unknown: relation.extra": lambda c: _put(c, 0, "aggr.extra", torch.ones(1)),
    r"model\[0\].* missing: mlp_in.bias": lambda c: c["model"][0].pop("fc.mlp.layers.0.bias"),
    r"model\[0\].* missing: relation.layers.0.norm2.bias": lambda c: c["model"][0].pop("aggr.layers.0.norm2.bias"),
    r"model\[0\]: missing: the matrix fc.fc.weight": lambda c: c["model"][0].pop("fc.fc.weight"),
    r"model\[0\], .* mlp_out.bias: expected shape \(32,\), found \(3,\)": (
        lambda c: _put(c, 0, "fc.mlp.layers.1.bias", torch.ones(3))
    ),
    r"model\[1\], .* linear.bias: expected shape": lambda c: _put(c, 1, "linear.bias", torch.ones(3)),
    r"fc.fc.bias: expected finite numbers": lambda c: _put(c, 0, "fc.fc.bias", torch.full((32,), torch.nan)),
    r"fc.fc.bias: expected a dense tensor": lambda c: _put(c, 0, "fc.fc.bias", torch.ones(32).to_sparse()),
    r"fc.fc.bias: expected floating point numbers": lambda c: _put(c, 0, "fc.fc.bias", torch.ones(32).int()),
    "epoch: expected a whole number from 0, found NoneType": lambda c: c.update(epoch=None),
    r"fc.fc.bias: expected a tensor, found int": lambda c: _put(c, 0, "fc.fc.bias", 3),
    r"model\[1\]: missing: bert": lambda c: c["model"][1].pop("bert.embeddings.word_embeddings.weight"),
    "opt.no_imgnorm: expected False": lambda c: setattr(c["opt"], "no_imgnorm", True),
    "opt.deep: expected a plain value, found Namespace": lambda c: setattr(c["opt"], "deep", argparse.Namespace()),
    "opt.nhead: expected a divisor": lambda c: setattr(c["opt"], "nhead", 5),
    "opt.nhead: expected a whole number": lambda c: setattr(c["opt"], "nhead", "4"),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, message: str) -> None:
    content = contents()
    REFUSED[message](content)
    with pytest.raises(ValueError, match=message) as error:
        compat.read_release_checkpoint(saved(tmp_path / "x.pth", content))
    assert str(error.value).startswith(str(tmp_path / "x.pth"))


def test_a_flipped_bit_is_noticed(file: Path) -> None:
    weight = contents()["model"][0]["fc.fc.weight"].numpy().tobytes()
    damaged = bytearray(file.read_bytes())
    damaged[bytes(damaged).index(weight) + 3] ^= 0x40
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model_best\.pth: .*the checksum of .* does not fit"):
        compat.read_release_checkpoint(file)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"no pickle", b"\x80\x02N."])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert not compat.is_release_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: expected "):
        compat.read_release_checkpoint(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError):
        compat.read_release_checkpoint(tmp_path / "none.pth")


# ---------------------------------------------------------------------------------------- in the script


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("precomputed"), train=16, dev=6, test=6)  # of 24 features, as recorded


@pytest.fixture(scope="module")
def bert(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with other weights than those in the checkpoint."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = sorted(set((data / "train_caps.txt").read_text().lower().replace(".", "").split()))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(2)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(bert))
    content = contents(bert=model.state_dict())
    return saved(tmp_path_factory.mktemp("theirs") / "model_best.pth", content)


@pytest.fixture
def script() -> Any:
    for package in ("tqdm", "tensorboard", "matplotlib"):
        pytest.importorskip(package, reason='the script needs pip install "hrem-layers[examples]"')
    import flickr30k

    return flickr30k


def test_text_embeddings_are_those_of_torch_s_own_layers(theirs: Path, bert: Path) -> None:
    """None are recorded: computed here with BERT and TransformerEncoder themselves, without padding."""
    transformers = pytest.importorskip("transformers")
    from authors_checkpoint import as_state
    from retrieval_model import Words, build

    state = as_state(compat.read_release_checkpoint(theirs))
    built = build(argparse.Namespace(**{**state["arguments"], "bert": str(bert)}), 24, Words([]))
    built.model.load_state_dict(state["model"])
    ids = torch.tensor([built.encode("a red dog in the park", None)])
    embedding, _ = built.model.eval().text_encoder(ids, torch.ones_like(ids, dtype=torch.bool))

    weights = torch.load(theirs, weights_only=False)["model"][1]
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(bert)).eval()
    model.load_state_dict(
        {k.removeprefix("bert."): x for k, x in weights.items() if k.startswith("bert.")}, strict=False
    )
    words = model(input_ids=ids).last_hidden_state @ weights["linear.weight"].t() + weights["linear.bias"]
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=32, batch_first=True)
    reference = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    reference.load_state_dict({k.removeprefix("aggr."): x for k, x in weights.items() if k.startswith("aggr.")})
    expected = 0.8 * words.topk(2, dim=1).values.mean(dim=1) + 0.2 * reference(words).mean(dim=1)
    assert_near(embedding, expected, 1e-5)


def test_eval_only(script: Any, theirs: Path, bert: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--eval-only", str(theirs), "--bert", str(bert), "--data-dir", str(data), "--output-dir", str(tmp_path)]
    script.main([*options, "--device", "cpu"])
    assert "encoders of the authors' release, epoch 7, rSum 531.5" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["rsum"] > 0
    assert (tmp_path / "report.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "give the --data-dir that it is for"),
        (["--bert", "DATA"], "expected a folder with config.json"),
    ],
)
def test_eval_only_says_what_is_missing(
    script: Any, theirs: Path, data: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    where = [] if not change else ["--data-dir", str(data)]
    change = [str(data) if x == "DATA" else x for x in change]
    with pytest.raises(SystemExit) as error:
        script.main(["--eval-only", str(theirs), *where, *change, "--output-dir", str(tmp_path)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_training_goes_on_from_it(script: Any, theirs: Path, bert: Path, data: Path, tmp_path: Path) -> None:
    import checkpoint

    options = ["--text-encoder", "bert", "--bert", str(bert), "--embed-dim", "32", "--num-heads", "4"]
    start = ["--init-from", str(theirs)]
    script.main(command(data, tmp_path / "run", "--epochs", "1", *options, *start, "--lr", "1e-12"))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    read = compat.read_release_checkpoint(theirs)
    for key, x in read.image_encoder.items():
        if "running" not in key:
            torch.testing.assert_close(state["model"][f"image_encoder.{key}"], x, rtol=1e-5, atol=1e-9)
    for key, x in read.text_encoder.items():
        torch.testing.assert_close(state["model"][f"text_encoder.{key}"], x, rtol=1e-5, atol=1e-9)
    assert any(key.startswith("loss.graph") for key in state["model"])
    # on from there, without naming the file again: what was trained meanwhile stays
    script.main(command(data, tmp_path / "run", "--epochs", "2", *options, "--resume", "--lr", "1e-12"))
    # and from the script's own
    script.main(
        command(data, tmp_path / "next", "--epochs", "1", *options, "--init-from", str(tmp_path / "run/best.pt"))
    )
    for change, message in (
        (["--num-heads", "2"], "--num-heads is 4 there and 2 here"),
        (["--embed-dim", "16"], "--embed-dim is 32 there and 16 here"),
        (["--text-encoder", "bigru"], "--text-encoder is bert there and bigru here"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main(command(data, tmp_path / message[2:8], "--epochs", "1", *options, *start, *change))
