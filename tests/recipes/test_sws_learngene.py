"""SWS: the card's exact checks, what is shared and what is not, fresh heads, and mistakes told before a step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from table import Row
from torch import nn

import stillhouse
from stillhouse.cli import invoke
from stillhouse.data import load
from stillhouse.distill import Distill
from stillhouse.errors import UserError
from stillhouse.evaluate import call, count_params, logits_of
from stillhouse.export import export
from stillhouse.family import Family
from stillhouse.models import ModelSpec
from stillhouse.outcomes import Member
from stillhouse.recipes.sws_learngene.experiment import SMALL, TEACHER, TINY, VIT, gene_of
from stillhouse.recipes.sws_learngene.gene import learned, set_drop_path, shared
from stillhouse.recipes.sws_learngene.recipe import Config, auxiliary, descend, distill
from stillhouse.run import Run
from stillhouse.students.parametrized import bake, parametrize_weights, weight_layers
from stillhouse.students.plan import Plan
from stillhouse.students.projectors import Symmetric
from stillhouse.students.sharing import even_stages, share_by_stage, spread, starts
from stillhouse.system import Clock
from stillhouse.teachers import Frozen, state_fingerprint
from stillhouse.weights import constant

DRY = {"drop_path": 0.0, "mixup": 0.0}
ROWS = [
    Row("sws_learngene", "labels and stages", {"alpha": 0.5, "stages": (3, 1), "element_mean": True, **DRY}),
    Row("sws_learngene", "another depth, not tuned", {"depth": 5, "tune_epochs": 0.0}),
]
ZERO = [  # with alpha 0 nothing is left of the teacher: neither its temperature nor its training
    (
        Row("sws_learngene", "alpha 0", {"alpha": 0.0, "temperature": 1.0, "teacher_epochs": 0.0}),
        Row("sws_learngene", "alpha 0, T 9", {"alpha": 0.0, "temperature": 9.0, "teacher_epochs": 1.0}),
    ),
]
SGD = {"optimizer": "sgd", "lr": 0.01, "tune_lr": 0.01, "teacher_epochs": 0.0, **DRY}
JOINT = [Row("sws_learngene", "sgd", {**SGD, "alpha": 0.7})]


def vit(depth=4, double=True, seed=0, **options):
    model = replace(SMALL, classes=3, options={**SMALL.options, "depth": depth, **options}).build(seed=seed)
    with torch.no_grad():  # so that no two blocks, norms or biases are alike by chance
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model.double() if double else model


def images(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64), "label": torch.arange(n) % 3}


# -- the card's exact checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(2, 2), (1, 3), (1, 2, 1), (4,)])
def test_a_descendant_with_the_stages_of_the_auxiliary_answers_as_it_does(stages):
    """(1) norm then pool, as the auxiliary; in float64 to the last bits, in float32 within 1e-6."""
    for double in (True, False):
        base, x = vit(double=double), images()["input"]
        aux, path, sizes = shared(base, "", 0, stages, 5)
        gene = learned(aux, base, path, sizes, None, "abc")
        net = gene.expand([m for m, n in enumerate(stages) for _ in range(n)])
        x = x if double else x.float()
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(x), aux.eval()(x), rtol=0, atol=1e-12 if double else 1e-6)
    assert isinstance(aux.norm, nn.LayerNorm) and isinstance(aux.fc_norm, nn.Identity)
    other = gene.expand([0] * sum(stages))
    if len(stages) > 1:
        with torch.no_grad():
            assert (other.eval()(x) - aux(x)).abs().max() > 1e-3


def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_layers():
    """(2) against the untied copy, for every parameter of a block: both norms, qkv, projection, fc1, fc2."""
    base, b = vit(), images()
    aux, path, sizes = shared(base, "", 0, (3, 1), 5)
    untied = learned(aux, base, path, sizes, None, "abc").expand([0, 0, 0, 1])
    for net in (aux, untied):
        F.cross_entropy(net(b["input"]), b["label"]).backward()
    names = [n for n, _ in base.blocks[0].named_parameters()]
    assert len(names) == 12
    for n in names:
        parts = [block.get_parameter(n).grad for block in untied.blocks]
        torch.testing.assert_close(aux.blocks[0].get_parameter(n).grad, sum(parts[:3]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(aux.blocks[3].get_parameter(n).grad, parts[3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(aux.head.weight.grad, untied.head.weight.grad, rtol=1e-9, atol=1e-12)


def test_alpha_zero_is_training_on_labels():
    """(3) gradients of cross-entropy, whatever the teacher says."""
    student, teacher, b = vit(), vit(seed=1), images()
    plain = copy.deepcopy(student)
    system = Distill(student, Frozen(teacher), objectives=["kd:0?T=1"], label=1.0)
    system.learn(b, Clock()).total.backward()
    F.cross_entropy(plain(b["input"]), b["label"]).backward()
    for p, q in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_sources_by_depth():
    """(4) and the rules around it."""
    assert spread(12, 5) == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4)
    assert [spread(12, 5).count(m) for m in range(5)] == [3, 3, 2, 2, 2]
    assert spread(5, 5) == (0, 1, 2, 3, 4) and spread(6, 5) == (0, 0, 1, 2, 3, 4)
    assert spread(1, 5) == (0,) and spread(2, 5) == (0, 4) and spread(4, 5) == (0, 1, 3, 4)
    for d in range(1, 30):
        for m in range(1, 9):
            s = spread(d, m)
            assert len(s) == d and list(s) == sorted(s) and s[0] == 0
            counts = [s.count(k) for k in range(m)]
            assert max(counts) - min(counts) <= 1 and (d < m or counts == sorted(counts, reverse=True))
    assert even_stages(16, 5) == (3, 3, 4, 3, 3) and starts((3, 3, 4, 3, 3)) == (0, 3, 6, 10, 13)
    assert all(
        sum(even_stages(n, m)) == n and min(even_stages(n, m)) > 0 for n in range(1, 20) for m in range(1, n + 1)
    )


def test_after_expansion_nothing_is_shared():
    """(5) changing one layer leaves its siblings, the gene and the auxiliary as they were."""
    base = vit()
    aux, path, sizes = shared(base, "", 0, (2, 2), 5)
    gene = learned(aux, base, path, sizes, None, "abc")
    nets = [gene.expand(spread(6, 2)) for _ in range(2)]
    pointers = [p.data_ptr() for net in (*nets, gene.network, aux) for p in net.parameters()]
    assert len(pointers) == len(set(pointers))
    before = [state_fingerprint(m) for m in (nets[1], gene.network, aux, *list(nets[0].blocks)[1:])]
    with torch.no_grad():
        for p in nets[0].blocks[0].parameters():
            p.zero_()
    assert [state_fingerprint(m) for m in (nets[1], gene.network, aux, *list(nets[0].blocks)[1:])] == before


# -- what is shared -----------------------------------------------------------------------------------------------


def test_all_of_a_block_is_shared_and_nothing_else():
    base = vit()
    aux, path, sizes = shared(base, "", 0, (3, 1), 5)
    assert path == "blocks" and sizes == (3, 1)
    for n, p in aux.blocks[0].named_parameters():
        assert aux.blocks[1].get_parameter(n) is p and aux.blocks[2].get_parameter(n) is p
        assert aux.blocks[3].get_parameter(n) is not p
    block = count_params(base.blocks[0])
    assert count_params(aux) == count_params(base) - 2 * block
    assert count_params(learned(aux, base, path, sizes, None, "abc").network) == count_params(aux)
    assert len({id(p) for p in aux.parameters()}) == len(list(aux.parameters()))  # one entry for an optimiser
    assert all(p.data_ptr() not in {q.data_ptr() for q in base.parameters()} for p in aux.parameters())


def test_shared_weights_stay_shared_through_training_saving_and_loading(tmp_path):
    base = vit(double=False)
    aux, _, _ = shared(base, "", 0, (2, 2), 5)
    state = {k: v.clone() for k, v in aux.state_dict().items()}
    optimizer = torch.optim.AdamW(aux.parameters(), lr=0.1, weight_decay=0.5)
    F.cross_entropy(aux(images()["input"].float()), images()["label"]).backward()
    optimizer.step()
    assert torch.equal(aux.blocks[0].mlp.fc1.weight, aux.blocks[1].mlp.fc1.weight)
    assert not torch.equal(aux.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    aux.load_state_dict(state)
    aux.to(torch.float64)
    assert aux.blocks[0].mlp.fc1.weight is aux.blocks[1].mlp.fc1.weight


def test_decay_is_applied_once_to_a_shared_weight():
    aux, _, _ = shared(vit(), "", 0, (4,), 5)
    w = aux.blocks[0].mlp.fc1.weight.detach().clone()
    for p in aux.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(aux.parameters(), lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(aux.blocks[3].mlp.fc1.weight, w * (1 - 0.05))


def test_every_layer_has_its_own_stochastic_depth():
    aux, path, _ = shared(vit(), "", 0, (2, 2), 5)
    assert set_drop_path(aux, path, 0.3) == 8
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in aux.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert aux.blocks[2].attn.qkv.weight is aux.blocks[3].attn.qkv.weight
    assert all(isinstance(b.drop_path2, nn.Identity) for b in aux.blocks if set_drop_path(aux, path, 0.0))


def test_another_depth_than_the_models():
    base = vit(4)
    aux, path, sizes = shared(base, "", 7, (), 3)
    assert len(aux.blocks) == 7 and sizes == (2, 3, 2) and len(base.blocks) == 4
    gene = learned(aux, base, path, sizes, None, "abc")
    plan_of = [gene.plan.edits[0].source, spread(7, 4)]
    assert plan_of[0] == tuple(plan_of[1][i] for i in (0, 2, 5))
    for m, first in enumerate((0, 2, 5)):
        for n, p in gene.network.blocks[m].named_parameters():
            assert torch.equal(p, aux.blocks[first].get_parameter(n))


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_encoders_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 16}
    if kind.startswith("Bert"):
        config = transformers.BertConfig(**sizes, vocab_size=30, num_labels=3)
        x = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    else:
        config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=3)
        x = torch.randn(2, 1, 8, 8)
    base = getattr(transformers, kind)(config).eval()
    aux, path, stages = shared(base, "", 0, (3, 1), 5)
    assert count_params(aux) == count_params(base) - 2 * count_params(base.get_submodule(f"{path}.0"))
    spec = ModelSpec.of(base, (1, 8, 8), 3)
    gene = learned(aux, base, path, stages, spec, "abc")
    net = gene.expand((0, 0, 0, 1)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(call(net, x)), logits_of(call(aux.eval(), x)), rtol=0, atol=1e-6)
    assert net.config.num_hidden_layers == 4 and gene.network.config.num_hidden_layers == 2
    from stillhouse.outcomes import Models

    wide = gene.for_classes("abcde", 0)
    member = wide.member(3, 1.0)
    Models([member], x, member.spec).save(tmp_path)
    again = stillhouse.load(tmp_path / "students/d03")
    with torch.no_grad():
        found = logits_of(call(again, x))
        assert torch.equal(found, logits_of(call(member.model.eval(), x))) and found.shape == (2, 5)


# -- the losses ---------------------------------------------------------------------------------------------------


def test_the_soft_loss_by_hand(tmp_path, monkeypatch):
    """L = (1−α) CE + α τ² Σ p_T (log p_T − log p_S) / n, and with element_mean / (n·C), as released."""
    seen = []
    monkeypatch.setattr(
        "stillhouse.recipes.sws_learngene.recipe.fit", lambda run, name, system, *a, **k: seen.append(system)
    )
    teacher, data = TEACHER.build(seed=5).eval(), load("digits", limit=32)
    for element_mean in (False, True):
        cfg = replace(TINY, alpha=0.6, temperature=2.0, element_mean=element_mean, teacher_epochs=0.0, **DRY)
        auxiliary(Run(tmp_path, quiet=True, device="cpu"), data, SMALL, teacher, cfg)
        system = seen.pop()
        b = data.train.take(torch.arange(8).numpy())
        with torch.no_grad():
            z, t = system.student(b["input"]), teacher(b["input"])
            p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
            soft = 4 * (p * (p.log() - q.log())).sum() / 8 / (10 if element_mean else 1)
            terms = system.learn(b, Clock()).terms
        torch.testing.assert_close(terms["kd"], 0.6 * soft)
        torch.testing.assert_close(terms["label"], 0.4 * F.cross_entropy(z, b["label"]))


# -- what it gives ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sws")
    cfg = replace(TINY, depths=(1, 3), teacher_epochs=0.0, **DRY)
    run = Run(folder, quiet=True, device="cpu")
    family = distill(run, load("digits", limit=64), SMALL, TEACHER.build(seed=1), cfg)
    family.save(folder)
    return folder, family, cfg


def test_members_reload_from_their_folders(made):
    folder, family, _ = made
    assert [m.name for m in family] == ["learngene", "d01", "d03"]
    assert sum(m.importance for m in family) == pytest.approx(1.0) and family["learngene"].importance == 0
    x = torch.randn(3, 1, 8, 8)
    for m in family:
        again = stillhouse.load(folder / "students" / m.name)
        with torch.no_grad():
            assert torch.equal(again(x), m.model(x))
    assert [e.source for e in family["d03"].plan.edits] == [(0, 2), (0, 0, 1)]
    assert Plan.from_json(family["d03"].plan.to_json()) == family["d03"].plan
    assert not any(getattr(m, "drop_prob", None) for m in family["d03"].model.modules())


def test_further_depths_from_a_saved_gene(made, tmp_path):
    """Its blocks as they are; the head too where the classes are the same, and a fresh one where they are not."""
    folder, family, cfg = made
    gene = gene_of(str(folder / "students/learngene"), cfg)
    assert state_fingerprint(gene.network) == state_fingerprint(family["learngene"].model) and len(gene) == 2
    run, data = Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=64)
    more = descend(run, data, gene, replace(cfg, depths=(4,), tune_epochs=0.0))
    assert torch.equal(more["d04"].model.head.weight, gene.network.head.weight)
    for k, m in enumerate((0, 0, 1, 1)):
        for n, p in more["d04"].model.blocks[k].named_parameters():
            assert torch.equal(p, gene.network.blocks[m].get_parameter(n))
    for classes in ("abcdefghij", "abcdefg"):
        other = gene.for_classes(classes, 1)
        assert other.network.head.out_features == len(classes)
        assert not torch.equal(other.network.head.weight[:7], gene.network.head.weight[:7])
        assert torch.equal(other.network.blocks[0].norm1.weight, gene.network.blocks[0].norm1.weight)
        built = other.plan.build(other.spec.build())
        assert {k: v.shape for k, v in built.state_dict().items()} == {
            k: v.shape for k, v in other.network.state_dict().items()
        }


def test_a_descendant_exports(made, tmp_path):
    model = made[1]["d03"].model
    for to, file in (("torch-export", "d.pt2"), ("onnx", "d.onnx")):
        if to == "onnx":
            pytest.importorskip("onnxruntime")
        assert export(model, torch.zeros(2, 1, 8, 8), to, tmp_path / file).max_abs_diff < 1e-4


def test_the_teacher_and_the_base_stay_as_they_were(tmp_path):
    base, teacher = SMALL.build(seed=3), TEACHER.build(seed=4)
    before = [state_fingerprint(m) for m in (base, teacher)]
    cfg = replace(TINY, depths=(2,), teacher_epochs=0.0)
    distill(Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=64), base, teacher, cfg)
    assert [state_fingerprint(m) for m in (base, teacher)] == before


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depths": ()}, "depths: expected different numbers of layers"),
        ({"depths": (4, 0)}, "depths"),
        ({"depths": (4, 4)}, "depths"),
        ({"alpha": 1.5}, "alpha in"),
        ({"drop_path": 1.0}, "drop_path in"),
        ({"epochs": 0.0}, "epochs: expected a positive number"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(UserError, match=says) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


def test_wrong_stages_blocks_and_classes_are_told_before_a_step(tmp_path):
    run, data, teacher = Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=32), TEACHER.build()
    small = ModelSpec("stillhouse:cnn", 7, (1, 8, 8)).build()
    cases = [
        (SMALL, teacher, {"stages": (3, 3)}, "stages 3 3 are 6 layers, but there are 4"),
        (SMALL, teacher, {"blocks": "block"}, "no module 'block'"),
        (SMALL, teacher, {"blocks": "head"}, "head: Linear is no list of blocks"),
        (ModelSpec("stillhouse:cnn", 10, (1, 8, 8)), teacher, {}, "no list of blocks with the same parameters"),
        (SMALL, small, {}, "teacher 0 gives 7 logits"),
    ]
    for base, who, changes, says in cases:
        with pytest.raises(UserError, match=says) as error:
            distill(run, data, base, who, replace(TINY, **{"teacher_epochs": 0.0, **changes}))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "stages").exists()


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert invoke(["run", "sws_learngene", "--data", "digits", "--device", "cpu", "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err.strip()
    assert "--teacher is missing" in said and said.count("\n") == 0
    assert invoke(["run", "sws_learngene", "--depths", "0", "--out", str(tmp_path / "b")]) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--teacher", "stillhouse:cnn", "--stages", "2", "2", "--genes", "3"], "--genes does nothing here: --stages"),
        (["--teacher", "stillhouse:cnn", "--alpha", "0", "--temperature", "2"], "--temperature does nothing here"),
        (["--teacher", "stillhouse:cnn", "--teacher-lr", "0.1"], "--teacher-lr does nothing here"),
        (["--teacher", "stillhouse:cnn", "--tune-epochs", "0", "--tune-lr", "1"], "--tune-lr does nothing here"),
        (["--model", "GENE", "--teacher", "stillhouse:cnn"], "--teacher does nothing here: --model is of another run"),
        (["--model", "GENE", "--epochs", "3"], "--epochs does nothing here: --model is of another run"),
    ],
)
def test_flags_that_do_nothing_are_refused(flags, says, made, tmp_path, capsys):
    flags = [str(made[0] / "students/learngene") if f == "GENE" else f for f in flags]
    assert invoke(["run", "sws_learngene", "--data", "digits", *flags, "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and said.count("\n") == 0


def test_a_quantised_student_gives_its_values_and_not_its_codes(tmp_path):
    """`--model` of another run: a pipeline's student of 8 bits, made deeper, loads from its folder alone."""
    network, plan = SMALL.build(seed=2).eval(), Plan.identity(SMALL.build())
    parametrize_weights(network, weight_layers(network), lambda path, layer: Symmetric(8))
    member = Member("small", network, plan.then(*bake(network)), spec=SMALL)
    Family([member], SMALL.shape, tuple("abcdefghij"), network, SMALL).save(tmp_path)
    cfg = replace(TINY, depths=(6,), tune_epochs=0.0)
    gene = gene_of(str(tmp_path / "students/small"), cfg)
    family = descend(Run(tmp_path, quiet=True, device="cpu"), load("digits", limit=64), gene, cfg)
    family.save(tmp_path / "deeper")
    again = stillhouse.load(tmp_path / "deeper/students/d06")
    with torch.no_grad():
        assert torch.equal(again(torch.ones(1, 1, 8, 8)), family["d06"].model(torch.ones(1, 1, 8, 8)))
    assert torch.equal(again.blocks[0].mlp.fc1.weight, network.blocks[0].mlp.fc1.weight)


def test_the_defaults_have_the_published_schedule():
    assert VIT["class_token"] is False and VIT["fc_norm"] is False
    cfg = Config()
    assert (cfg.alpha, cfg.temperature, cfg.epochs, cfg.tune_epochs, cfg.tune_lr) == (1.0, 1.0, 150.0, 10.0, 5e-5)
    assert constant()(Clock()) == 1.0 and share_by_stage([nn.Linear(1, 1)], (1,)) is None
