"""Seconds are counted once, where they were spent; the test sets the clock."""

from dmae_ds.train import step_timer
from dmae_ds.train.step_timer import StepTimer


def test_waiting_is_counted_once_and_the_parts_add_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: now[0])

    def take(seconds, items):
        for item in items:
            now[0] += seconds
            yield item

    timer = StepTimer()
    stream = timer.waiting("teacher", take(10, timer.waiting("data", take(1, range(3)))))
    laps = []
    for _ in stream:
        now[0] += 100
        laps.append(timer.lap())
    assert laps == [{"seconds/data": 1, "seconds/teacher": 10, "seconds/rest": 100}] * 3
    now[0] += 5
    assert timer.lap() == {"seconds/data": 0, "seconds/teacher": 0, "seconds/rest": 5}
    with timer.booking("save"):
        now[0] += 3
    now[0] += 2
    assert timer.lap() == {"seconds/data": 0, "seconds/teacher": 0, "seconds/save": 3, "seconds/rest": 2}
