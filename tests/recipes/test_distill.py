"""Plain distillation as a system: the contract's rows, the cache, teachers by name, mistakes told before a step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from table import Row

from stillhouse import plain
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.export import save_student
from stillhouse.models import ModelSpec
from stillhouse.recipes.distill.experiment import STUDENT, TEACHER, TINY
from stillhouse.recipes.distill.recipe import Config, distill
from stillhouse.run import Run
from stillhouse.students.plan import Plan

MLP = ModelSpec("stillhouse:mlp", 10, (1, 8, 8), options={"widths": [16]})
_SGD = {"optimizer": "sgd", "lr": 0.05, "teacher_epochs": 0.0}

MANY = ("dkd:1", "pld:1", "vid:block1:1", "contrastive:hidden:1?width=8", "flow:block1>block2:1")
ROWS = [
    Row("distill", "many", {"objective": MANY}),
    Row("distill", "cached", {"objective": ("kd:0.9",), "cache": 2, "epochs": 3.0}),
]  # fmt: skip
ZERO = [
    (
        Row("distill", "weight 0", {"objective": ("kd:0", "attention:block2:0"), "label": 1.0}),
        Row("distill", "labels alone", {"objective": (), "label": 1.0}),
    )
]


def mlp(objective):
    """Without batch norm: a student that several processes can train."""
    return Row("distill", "+".join(objective), {**_SGD, "objective": objective}, {"student": MLP})


JOINT = [mlp(("kd:0.5?T=4",)), mlp(("dkd:0.1", "pld:0.5", "feature:1=hidden:1"))]


def made(folder, cfg, student=STUDENT, **options):
    teacher = TEACHER.build(seed=3)
    return distill(Run(folder, quiet=True, device="cpu", **options), load("digits", limit=96), student, teacher, cfg)


def test_a_cached_teacher_says_what_the_live_one_says(tmp_path):
    plain = {"objective": ("kd:0.9?T=2",), "teacher_epochs": 0.0, "epochs": 2.0}
    live = made(tmp_path / "live", replace(TINY, **plain))
    kept = made(tmp_path / "kept", replace(TINY, **plain, cache=0))
    a, b = (f["student"].model.state_dict() for f in (live, kept))
    assert all(
        torch.allclose(a[k], b[k], atol=1e-5) for k in a
    )  # digits are not augmented: every view is the plain one


def test_the_teacher_is_trained_once_and_reported_beside_the_student(tmp_path, capsys):
    folder = tmp_path / "run"
    common = ["distill", "--data", "digits", "--limit", "100", "--epochs", "1", "--quiet"]
    objectives = ["--objective", "kd:0.5", "--objective", "cka:hidden=1:0.1"]
    first = ["--teacher", "stillhouse:mlp", "--teacher-epochs", "2", *objectives]
    assert invoke([*common, *first, "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "teacher" in said and "student" in said and (folder / "stages/teacher").exists()
    assert (folder / "students/student/plan.json").exists()
    assert invoke([*common, "--teacher", str(folder / "students/student"), "--out", str(tmp_path / "second")]) == 0


TRAINED = ["--teacher-epochs", "1", "--teacher", "stillhouse:cnn"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--teacher is missing"]),
        (["--teacher", "timm:resnet18"], ["1000 classes", "--teacher-epochs"]),
        (["--teacher", "stillhouse:cnn"], ["no classes", "--teacher-weights"]),
        (["--teacher", "stillhouse:cnn", "--teacher-weights", "nowhere.safetensors"], ["nowhere.safetensors"]),
        ([*TRAINED, "--objective", "kdd:1"], ["did you mean 'kd'"]),
        ([*TRAINED, "--objective", "feature:block9:1"], ["block9", "block1"]),
        ([*TRAINED, "--cache", "1", "--objective", "cka:block1:1"], ["cache", "logits only"]),
    ],
    ids=lambda v: " ".join(v)[:50],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    code = invoke(
        [
            "distill",
            "--data",
            "digits",
            "--limit",
            "64",
            "--epochs",
            "1",
            "--quiet",
            *flags,
            "--out",
            str(tmp_path / "x"),
        ]
    )
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and all(w in said for w in words), said


def test_weights_of_another_network_are_named(tmp_path, capsys):
    other = ModelSpec("stillhouse:cnn", 10, (1, 8, 8), options={"widths": [4, 4, 4]}).build()
    save_student(tmp_path / "w", other, plan_json={"plan": Plan.identity(other).to_json()})
    weights = str(tmp_path / "w/model.safetensors")
    code = invoke(
        [
            "distill",
            "--data",
            "digits",
            "--teacher",
            "stillhouse:cnn",
            "--teacher-weights",
            weights,
            "--out",
            str(tmp_path / "x"),
        ]
    )
    assert code == 2 and "block1.0.weight" in capsys.readouterr().err


def test_classes_are_checked_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"student gives 4 logits.*10 classes"):
        made(tmp_path, TINY, ModelSpec("stillhouse:cnn", 4, (1, 8, 8)))
    with pytest.raises(UserError, match="epochs"):
        Config(epochs=0)


# -- said before a teacher is trained; teachers of several kinds -------------------------------------------------------


def cli(tmp_path, capsys, *flags, data=("--data", "digits", "--limit", "64")):
    """(exit code, the last line of what went wrong, the run's folder)."""
    out = tmp_path / "out"
    code = invoke(["distill", *data, "--epochs", "1", "--quiet", *flags, "--out", str(out)])
    lines = capsys.readouterr().err.strip().splitlines()
    return code, lines[-1] if lines else "", out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--objective", "feature:block9:1"], ["no module 'block9'"]),
        (["--objective", "feature:head=block1:1"], ["cannot be compared"]),
        (["--objective", "simkd:1"], ["reads pooled features"]),
        (["--objective", "cka:block1=3/block1:1", "--teacher", "stillhouse:mlp"], ["teacher 1…2", "'3/block1'"]),
        (["--objective", "kd:1?until=0.5", "--label", "0"], ["nothing is left to learn from"]),
        (["--objective", "kd:1?T=0"], ["T must be a positive number"]),
        (["--teacher-size", "0"], ["--teacher-size", "got 0"]),
        (["--teacher-size", "16"], ["--teacher-epochs", "drop one"]),
        (["--teacher-mean", "0.5"], ["--teacher-std", "1 numbers each"]),
    ],
    ids=lambda v: " ".join(v)[:60],
)  # fmt: skip
def test_mistakes_are_told_before_a_teacher_is_trained(flags, words, tmp_path, capsys):
    code, said, out = cli(tmp_path, capsys, *TRAINED, *flags)
    assert code == 2 and all(w in said for w in words), said
    assert not (out / "stages").exists()


def test_what_is_checked_first_leaves_no_trace(tmp_path):
    """The check works on a copy: a teacher that is trained first gives the student it gave without one."""
    cfg = replace(TINY, objective=("feature:block2:1", "kd:1"), teacher_epochs=1.0)
    first, teacher = TEACHER.build(seed=3), TEACHER.build(seed=3)
    for network in (first, teacher):
        network.block1.requires_grad_(False)  # what the user keeps from being trained stays so
    kept = {k: v.clone() for k, v in first.block1.named_parameters()}
    run = Run(tmp_path / "a", quiet=True, device="cpu")
    a = distill(run, load("digits", limit=96), STUDENT, first, cfg)["student"].model.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in first.block1.named_parameters())
    plain.train_teacher(
        Run(tmp_path / "t", quiet=True, device="cpu"), "teacher", teacher, load("digits", limit=96), cfg
    )
    run = Run(tmp_path / "b", quiet=True, device="cpu")
    b = distill(run, load("digits", limit=96), STUDENT, teacher, replace(cfg, teacher_epochs=0.0))
    assert all(torch.equal(v, a[k]) for k, v in b["student"].model.state_dict().items())


def test_the_reused_head_is_that_of_the_trained_teacher(tmp_path):
    net = ModelSpec("stillhouse:resnet8", 10, (1, 8, 8), options={"width": 4})
    teacher, fresh = net.build(seed=1), net.build(seed=1)
    cfg = replace(TINY, objective=("simkd:1",), label=0.0, teacher_epochs=1.0)
    run = Run(tmp_path, quiet=True, device="cpu")
    student = distill(run, load("digits", limit=96), net, teacher, cfg)["student"].model
    assert torch.equal(student.head.weight, teacher.linear.weight)
    assert not torch.equal(teacher.linear.weight, fresh.linear.weight)


def test_teachers_with_inputs_and_features_of_their_own(tmp_path):
    """Each of several teachers reads its own normalisation and size; features are of the one that is named."""
    data, seen = load("digits", limit=64), {}
    small, large = TEACHER.build(seed=1), ModelSpec("stillhouse:convnet", 10, (1, 16, 16), options={"width": 8}).build()
    small.register_forward_pre_hook(lambda m, x: seen.update(small=x[0]))
    large.register_forward_pre_hook(lambda m, x: seen.update(large=x[0]))
    mean, std = data.train.mean, data.train.std
    looks = [{}, {"resize": 16, "normalize": (mean, std, [0.5], [0.25])}]
    cfg = replace(TINY, objective=("kd:0.5", "feature:block2=2/3:1", "attention:block1=block2:10"), teacher_epochs=0.0)
    family = distill(Run(tmp_path, quiet=True, device="cpu"), data, STUDENT, [small, large], cfg, looks=looks)
    assert seen["small"].shape[2:] == (8, 8) and seen["large"].shape[2:] == (16, 16)
    assert {"kd", "feature", "attention"} <= {k for row in family.logs for k in row}
    assert [n.partition(":")[0] for n in family.notes if "student" in n] == ["kd", "feature", "attention"]
    with pytest.raises(UserError, match=r"looks: expected one per teacher \(1\), got 2"):
        distill(Run(tmp_path / "b", quiet=True, device="cpu"), data, STUDENT, small, cfg, looks=looks)


def test_transformers_and_convolutions_teach_each_other(tmp_path):
    """Library classes: timm's ViT and Swin (channels last), torchvision's ResNet; positions match where they are."""
    timm = pytest.importorskip("timm")

    def vit():
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=16, depth=2,
            num_heads=2,
        )  # fmt: skip

    def swin():
        return timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=8, patch_size=1, window_size=2, in_chans=1, num_classes=10,
            embed_dim=8, depths=(1, 1), num_heads=(2, 2),
        )  # fmt: skip

    flow = "flow:blocks.0>blocks.1=block1>block2:1"
    pairs = [
        (STUDENT, vit(), ("feature:block1=blocks.1:1", "attention:block1=blocks.0:10", "similarity:hidden=norm:1")),
        (STUDENT, swin(), ("feature:block1=layers.0:1", "nst:block2=layers.1:1")),
        (vit(), TEACHER.build(), ("feature:blocks.0=block1:1", "vid:blocks.1=block2:1", flow)),
        (vit(), swin(), ("icc:blocks.1=layers.1:1", "contrastive:norm=norm:1?width=8")),
    ]
    data = load("digits", limit=64)
    for k, (student, teacher, text) in enumerate(pairs):
        cfg = replace(TINY, objective=(*text, "kd:0.5"), teacher_epochs=0.0)
        family = distill(Run(tmp_path / str(k), quiet=True, device="cpu"), data, student, teacher, cfg)
        assert {o.partition(":")[0] for o in text} <= set(family.logs[-1])


# -- text: local folders of transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A folder with labelled sentences and, made with save_pretrained, tiny classifiers good and bad as teachers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("text")
    words = ["good", "fine", "bad", "poor", "a", "the", "film", "plot"]
    for name, n in (("train", 40), ("test", 16)):
        rows = [{"text": f"{words[4 + i % 4]} {words[i % 4]}", "label": "np"[i % 4 < 2]} for i in range(n)]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def save(name, labels, words, kind="BertForSequenceClassification"):
        (folder / "vocab.txt").write_text("\n".join(marks + words))
        names = dict(enumerate(labels)) if isinstance(labels, str) else {k: str(k) for k in range(labels)}
        config = transformers.BertConfig(
            vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=64, id2label=names, label2id={v: k for k, v in names.items()},
        )  # fmt: skip
        getattr(transformers, kind)(config).save_pretrained(folder / name)
        transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / name)

    save("good", "np", words)
    save("same", "np", words)
    save("three", 3, words)
    save("headless", "np", words, "BertModel")
    save("reversed", "pn", words)
    save("foreign", "np", words[::-1])
    return folder


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        (["three"], ["3 classes", "have 2", "--teacher-epochs"]),
        (["headless"], ["no trained classifier", "'classifier."]),
        (["reversed"], ["order ['p', 'n']"]),
        (["good", "foreign"], ["foreign", "tokenizer is", "take one of them"]),
    ],
)
def test_text_teachers_that_know_nothing_are_refused(teachers, words, sentences, tmp_path, capsys):
    given = [f for t in teachers for f in ("--teacher", f"hf:{sentences / t}")]
    data = ("--data", str(sentences / "data"))
    code, said, _ = cli(tmp_path, capsys, "--student", "bag", *given, data=data)
    assert code == 2 and all(w in said for w in words), said


def test_text_teachers_from_scratch_need_training(sentences, tmp_path, capsys):
    data = ("--data", str(sentences / "data"))
    code, said, _ = cli(tmp_path, capsys, "--student", "bag", "--teacher", "bert", data=data)
    assert code == 2 and "--teacher-epochs" in said


def test_text_teachers_of_one_tokenizer_are_averaged(sentences, tmp_path, capsys):
    given = [f for t in ("good", "same") for f in ("--teacher", f"hf:{sentences / t}")]
    objectives = ["--objective", "kd:1", "--objective", "cka:hidden=2/bert.encoder.layer.1:1"]
    data = ("--data", str(sentences / "data"))
    code, said, out = cli(tmp_path, capsys, "--student", "bag", *given, *objectives, data=data)
    assert code == 0 and (out / "students/student/tokenizer.json").exists(), said
