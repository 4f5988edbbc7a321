"""Seconds are booked where they were spent, once, on a clock that is turned by hand."""

from dmae_ds.train import step_timer
from dmae_ds.train.step_timer import StepTimer


def test_waiting_is_booked_once_and_the_parts_are_the_whole(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: now[0])

    def take(seconds, items):
        for item in items:
            now[0] += seconds
            yield item

    found = StepTimer()
    stream = found.waiting("teacher", take(10, found.waiting("data", take(1, range(3)))))
    laps = []
    for _ in stream:
        now[0] += 100
        laps.append(found.lap())
    assert laps == [{"seconds/data": 1, "seconds/teacher": 10, "seconds/rest": 100}] * 3
    now[0] += 5
    assert found.lap() == {"seconds/data": 0, "seconds/teacher": 0, "seconds/rest": 5}
    with found.booking("save"):
        now[0] += 3
    now[0] += 2
    assert found.lap() == {"seconds/data": 0, "seconds/teacher": 0, "seconds/save": 3, "seconds/rest": 2}
