from castalia.observe.update_history import history_before


def test_the_history_before_a_step_knows_what_was_undone():
    events = [
        {"event": "start", "step": 0},
        {"event": "save", "step": 10},
        {"event": "spike", "step": 13, "action": "skip"},
        {"event": "save", "step": 20},
        {"event": "rewind", "step": 25, "back_to": 10},
        {"event": "save", "step": 30},
        {"event": "start", "step": 30},
        {"event": "rewind", "step": 35, "back_to": 30},
    ]
    history = history_before(events, 40)
    assert (history.begin, history.saved, history.skipped) == (0, [10, 30], {13})
    assert history.rewound == {*range(11, 26), *range(31, 36)}
    undone = history_before(events, 23)
    assert (undone.saved, undone.skipped, undone.rewound) == ([10, 20], {13}, set())
    assert history_before(events, 10).saved == []
    assert history_before([*events, {"event": "start", "step": 10}], 23).saved == [10]  # done again, the other way
