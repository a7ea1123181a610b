"""Advice from recorded runs: reading reports, learning, the test on a task left out, commands, too few runs."""

from __future__ import annotations

import json
import math
import shlex

import numpy as np
import pytest

from stillhouse import recommend
from stillhouse.cli import invoke
from stillhouse.flags import configured, parse_flags
from stillhouse.recommend import Model, Recorded, facts_of, left_out, merged, read_runs
from stillhouse.recommend.learn import encoded
from stillhouse.recommend.pipelines import candidates
from stillhouse.report import Report, Student

TASKS = {"a": 1000, "b": 200, "c": 5000, "d": 60}
SETTINGS = [{"objective": [o], "label": w} for o in ("kd:1?T=1", "kd:1?T=4", "dist:1?T=1") for w in (0.0, 1.0)]


def worth(settings, train, rng):
    """What a made-up world pays: DIST best, labels good where there are few samples; and noise."""
    best = {"kd:1?T=1": 0.0, "kd:1?T=4": 0.03, "dist:1?T=1": 0.06}[settings["objective"][0]]
    return 0.9 + best + 0.02 * settings["label"] * (train < 500) + rng.normal(0, 0.004)


def record(folder, task, train, settings, ratio, *, system="distill", base=True, facts=True):
    """What a run leaves: report.json and run.json."""
    folder.mkdir(parents=True)
    size = {"weight_bytes": 4000.0}
    rows = [Student("student", "students/student", 100, metrics={"accuracy": 0.9 * ratio, "weight_bytes": 400.0})]
    if base:
        rows.insert(0, Student("teacher", None, 1000, metrics={"accuracy": 0.9, **size}, role="base"))
    about = {"data": task, "train": train, "test": 100, "classes": 10, "chance": 0.1, "inputs": 64, "text": False}
    report = Report(system, "t", "c", 0, {}, {"task": about} if facts else {}, [], rows)
    (folder / "report.json").write_text(json.dumps(report.to_json()))
    run = {"format": 1, "system": system, "flags": [], "settings": {"data": task, "seed": 0, "out": "x", **settings}}
    (folder / "run.json").write_text(json.dumps(run))


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    for k, (task, train) in enumerate(TASKS.items()):
        for i, s in enumerate(SETTINGS):
            record(tmp_path / f"runs/{task}/{i}", task, train, s, worth(s, train, rng) - 0.05 * k)
    return tmp_path / "runs"


def test_runs_are_read_with_their_pipeline_and_facts(runs, tmp_path):
    rows, unused = read_runs([runs], configured)
    assert len(rows) == 24 and not unused
    r = next(r for r in rows if r.task.startswith("c,") and r.settings["label"] == 1.0)
    assert r.system == "distill" and r.settings["epochs"] == 30.0 and "data" not in r.settings
    wanted = {
        "train": math.log10(5000),
        "classes": 1.0,
        "chance": 0.1,
        "text": 0.0,
        "teacher_score": 0.9,
        "size_ratio": -1.0,
    }
    assert {k: pytest.approx(r.facts[k]) for k in wanted} == wanted
    record(runs / "e/no-base", "e", 10, SETTINGS[0], 1.0, base=False)
    record(runs / "e/old", "e", 10, SETTINGS[0], 1.0, facts=False)
    record(runs / "e/odd", "e", 10, {"label": -3.0}, 1.0)
    rows, unused = read_runs([runs], configured)
    assert len(rows) == 24 and sorted(unused.values()) == [1, 1, 1]


def test_seeds_of_one_run_count_once():
    row = Recorded("t", "distill", {"label": 1.0}, {"size_ratio": -1.0}, 0.8)
    both = merged([row, Recorded("t", "distill", {"label": 1.0}, {"size_ratio": -1.0}, 1.0)])
    assert len(both) == 1 and both[0].ratio == pytest.approx(0.9) and both[0].runs == 2
    assert len(merged([row, Recorded("u", "distill", {"label": 1.0}, {"size_ratio": -1.0}, 0.8)])) == 2


def test_settings_become_numbers():
    assert encoded("s", True) == {"s": 1.0} and encoded("s", [0.5, 0.25]) == {"s[0]": 0.5, "s[1]": 0.25}
    made = encoded("objective", ["kd:0.9?T=4", "feature:layer2=layer3:100"])
    assert made == {"objective=kd": 0.9, "objective=kd.T": 4.0, "objective=feature": 100.0}


@pytest.mark.parametrize("kind", ["forest", "boosting"])
def test_what_holds_on_other_tasks_is_found_on_a_task_left_out(runs, kind):
    rows, _ = read_runs([runs], configured)
    found = left_out(rows, kind)
    assert len(found) == 4 and min(found.values()) > 0.5
    shuffled = np.random.default_rng(1).permutation([r.ratio for r in rows])
    lost = left_out([Recorded(r.task, r.system, r.settings, r.facts, float(x)) for r, x in zip(rows, shuffled)], kind)
    assert abs(np.mean(list(lost.values()))) < 0.5  # the test does not find what is not there


def test_the_level_of_a_task_is_not_a_merit_of_its_pipelines(runs):
    rows, _ = read_runs([runs], configured)
    easier = [Recorded(r.task, r.system, r.settings, r.facts, r.ratio + (r.task[0] == "d")) for r in rows]
    a, b = Model(rows), Model(easier)
    np.testing.assert_allclose(a.predict(rows)[0] - a.level, b.predict(rows)[0] - b.level)
    assert b.level - a.level == pytest.approx(0.25)


def test_candidates_are_all_combinations_that_the_system_takes(runs):
    rows, _ = read_runs([runs], configured)
    few = [r for r in rows if r.settings["objective"][0] != "dist:1?T=1" or r.settings["label"] == 0.0]
    found = candidates(few, configured)
    assert len(found) == 6 and {(*s["objective"], s["label"]) for _, s in found} >= {("dist:1?T=1", 1.0)}
    refuses = lambda system, s: None if s.get("label") else configured(system, s)  # noqa: E731
    assert len(candidates([r for r in few if not r.settings["label"]], refuses)) == 3


def test_what_does_nothing_makes_no_pipeline_of_its_own():
    """α is of the bound of mutual information: pipelines without it are one, whatever α stood beside them."""
    made = [
        configured("distiller_mi_alpha", {"intermediate": loss, "alpha": a}) for loss in ("mse", "mi") for a in (0, 1)
    ]
    assert made[0] == made[1] and made[0]["alpha"] == 0.9 and made[2] != made[3]
    rows = [Recorded("t", "distiller_mi_alpha", s, {}, 1.0) for s in made]
    assert len(candidates(rows, configured)) == 4  # mi with α = 0, 1 and the default; mse


def test_advice_is_a_list_of_commands_that_parse(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["recommend", str(runs), "--data", "digits", "--limit", "100", "--student", "stillhouse:mlp", "--top", "3"]
    assert invoke([*argv, "--teacher", "stillhouse:cnn", "--teacher-score", "0.95"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "24 students of 6 pipelines on 4 tasks" in said and "rank correlation 0." in said
    lines = [shlex.split(line) for line in said.splitlines() if line.strip().startswith("stillhouse ")]
    assert len(lines) == 3 and all("dist:1?T=1" in words or "kd:1?T=4" in words for words in lines[:1])
    for words in lines:
        options, config = parse_flags(words[1], words[2:])
        assert (options.data, options.limit, options.model) == ("digits", 100, "stillhouse:mlp")
        assert options.teacher == ("stillhouse:cnn",) and config.objective[0] in {s["objective"][0] for s in SETTINGS}
    assert invoke([*argv, "--json", "--learner", "boosting"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["recommended"]) == 3 and found["candidates"] == 6 and len(found["left_out"]) == 4
    first = found["recommended"][0]
    assert first["settings"]["objective"] == ["dist:1?T=1"] and first["spread"] is None
    assert first["settings"]["label"] == 1.0  # 100 samples are few, which only the tasks' facts can tell


def test_a_teacher_of_a_recorded_run_brings_its_score(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, facts = recommend.new_task("digits", teacher=str(runs / "a/0/students/student"), limit=50)
    report = json.loads((runs / "a/0/report.json").read_text())
    assert name == "digits" and facts["train"] == pytest.approx(math.log10(50))
    assert facts["teacher_score"] == pytest.approx(report["students"][1]["metrics"]["accuracy"])
    assert facts["teacher_size"] == pytest.approx(math.log10(400)) and math.isnan(facts["size_ratio"])
    assert math.isnan(facts_of({"train": 10, "classes": 2, "inputs": 4})["teacher_score"])


def test_too_few_runs_say_how_many_and_how(runs, tmp_path, capsys):
    for argv, words in (
        ([runs / "a"], ["8 runs", "found 6 of 6", "stillhouse distill"]),
        ([tmp_path / "none"], ["does not exist"]),
        ([tmp_path / "empty"], ["found 0 of 0"]),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert invoke(["recommend", *map(str, argv), "--data", "digits"]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and all(w in said for w in words), said


def test_what_is_done_is_left_out_of_the_commands(runs):
    rows, _ = read_runs([runs], configured)
    trained = [Recorded(r.task, r.system, {**r.settings, "teacher_epochs": 9.0}, r.facts, r.ratio) for r in rows]
    plain, short = (
        recommend.advise(trained, {}, lambda _: (), configured, without=w) for w in ((), ("teacher_epochs",))
    )
    assert all("--teacher-epochs 9.0" in c for _, c in plain.commands)
    assert all("teacher-epochs" not in c for _, c in short.commands)


def test_one_task_is_advice_without_a_test(runs):
    rows, _ = read_runs([runs], configured)
    one = [Recorded("t", r.system, {**r.settings, "epochs": i}, r.facts, r.ratio) for i, r in enumerate(rows[:9])]
    advice = recommend.advise(one, {}, lambda system: ["--data", "x"], configured, name="x")
    assert "too little to test" in advice.notes[1] and advice.commands[0][1].startswith("stillhouse distill --data x")
