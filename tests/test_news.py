"""News of a role: each item arrives once, also when an answer is lost on the way."""

import random

from titan.distill.news import News, Outbox
from titan.observe.metrics import EvalMetric


def metric(step: int) -> EvalMetric:
    return EvalMetric("teacher", step, 0.0, 1.0, 1.0, 8)


def test_every_item_arrives_once_and_in_order_though_answers_are_lost() -> None:
    chance, outbox = random.Random(0), Outbox()
    heard, got, sent = 0, list[News](), 0
    for _ in range(200):
        for _ in range(chance.randrange(4)):
            sent += 1
            outbox.put(metric(sent))
        number, items = outbox.take(heard)
        if chance.random() < 0.5:  # else the answer did not arrive
            heard, got = number, got + items
    got += outbox.take(heard)[1]
    assert got == [metric(step + 1) for step in range(sent)]


def test_what_may_not_have_arrived_is_kept() -> None:
    outbox = Outbox()
    outbox.put(metric(1))
    outbox.put({"event": "checkpoint"})
    number, _ = outbox.take(0)
    outbox.put(metric(2))
    assert outbox.metrics() == [metric(1), metric(2)]
    outbox.take(number)
    assert outbox.metrics() == [metric(2)]
