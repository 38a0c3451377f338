from hypothesis import given
from hypothesis import strategies as st

from fedcore.grids.schedule import Schedule


@given(
    st.integers(0, 40),
    st.lists(
        st.tuples(st.sampled_from(["done", "done", "done", "fail", "lose", "leave", "join"]), st.integers(0, 10**6)), max_size=300
    ),
)
def test_every_unit_is_done_once_whatever_happens_to_workers(units, events):
    schedule, held, done, coming = Schedule(units), {}, [], 0
    for kind, choice in [("join", 0), *events, *[("done", 0)] * (3 * units + 3)]:
        if kind == "join" or not held:
            schedule.join(coming)
            held[coming] = []
            coming += 1
        for worker, unit in schedule.hand_out():
            assert unit not in done and all(unit not in others for others in held.values())
            held[worker].append(unit)
            assert len(held[worker]) <= 2
        busy = [worker for worker in sorted(held) if held[worker]]
        if busy and kind in ("done", "fail"):
            worker = busy[choice % len(busy)]
            unit = held[worker].pop(0)
            before = schedule.tries[unit]
            if kind == "done":
                schedule.done(worker, unit)
                done.append(unit)
            else:
                assert schedule.fail(worker, unit) == before + 1
        if kind == "lose":
            worker = sorted(held)[choice % len(held)]
            lost = held.pop(worker)
            before = list(schedule.tries)
            assert schedule.lose(worker) == (before[lost[0]] + 1 if lost else 0)
            assert [unit for unit in range(units) if schedule.tries[unit] != before[unit]] == lost[:1]
        if kind == "leave":
            worker, before = sorted(held)[choice % len(held)], list(schedule.tries)
            held.pop(worker)
            schedule.leave(worker)
            assert schedule.tries == before
        while schedule.taken in done:
            schedule.taken += 1
    assert sorted(done) == list(range(units))


def test_workers_do_not_run_away_from_a_slow_unit():
    schedule, given_out = Schedule(100), []
    schedule.join(0)
    schedule.join(1)
    given_out += schedule.hand_out()
    assert given_out == [(0, 0), (1, 1), (0, 2), (1, 3)]
    finished = set()
    while mine := [unit for worker, unit in given_out if worker == 1 and unit not in finished]:  # worker 0 stays at unit 0
        schedule.done(1, mine[0])
        finished.add(mine[0])
        given_out += schedule.hand_out()
    assert sorted(unit for _, unit in given_out) == list(range(8))


def test_a_unit_that_failed_goes_to_another_worker_while_there_is_one():
    schedule = Schedule(1)
    schedule.join(0)
    schedule.join(1)
    assert list(schedule.hand_out()) == [(0, 0)]
    schedule.fail(0, 0)
    assert list(schedule.hand_out()) == [(1, 0)]
    schedule.lose(0)
    schedule.fail(1, 0)
    assert list(schedule.hand_out()) == [(1, 0)]  # nobody else is left
    assert schedule.tries == [2]
