"""What tells configs apart, in few words."""

from llama_lab.lab.labels import differences_of

MUON = {"optim": "muon", "optim.max_lr": 0.008, "optim.weight_decay": 0.8, "optim.momentum": 0.95}
ADAMW = {"optim": "adamw", "optim.max_lr": 0.001, "optim.weight_decay": 0.1, "optim.eps": 1e-8}


def test_a_kind_stands_for_the_fields_that_follow_from_it():
    assert differences_of([MUON, ADAMW]) == ["optim=muon", "optim=adamw"]
    assert differences_of([MUON, ADAMW, ADAMW | {"optim.max_lr": 0.002}]) == [
        "optim=muon max_lr=0.008",
        "optim=adamw max_lr=0.001",
        "optim=adamw max_lr=0.002",
    ]


def test_kinds_are_named_first_and_only_what_differs_is_named():
    wsd, linear = {"schedule": "wsd", "schedule.cooldown_fraction": 0.6}, {"schedule": "linear"}
    low = MUON | {"optim.max_lr": 0.004}
    assert differences_of([MUON | wsd, low | linear, MUON | linear]) == [
        "schedule=wsd max_lr=0.008",
        "schedule=linear max_lr=0.004",
        "schedule=linear max_lr=0.008",
    ]
    assert differences_of([MUON | wsd, MUON | linear, ADAMW | linear]) == [
        "optim=muon schedule=wsd",
        "optim=muon schedule=linear",
        "optim=adamw schedule=linear",
    ]
    assert differences_of([MUON, dict(MUON)]) == ["", ""]


def test_fields_of_one_kind_are_all_named():
    assert differences_of([MUON, MUON | {"optim.max_lr": 0.004, "optim.weight_decay": 0.1}]) == [
        "max_lr=0.008 weight_decay=0.8",
        "max_lr=0.004 weight_decay=0.1",
    ]
    assert differences_of([{"a.x": 1, "b.x": 1, "c": 1, "d": 1}, {"a.x": 2, "b.x": 2, "c": 2, "d": 2}])[0] == (
        "a.x=1 b.x=1 c=1 (and 1 more)"
    )
