"""Speed of ``selective_scan`` and ``selective_state_update`` beside their rivals and floors.

Each test is one block of rounds of one contender; see ``trifuse.report.arena`` for how blocks are
interleaved. A contender that does not match the float64 reference fails here and is not timed.
"""

OPS = ("selective_scan", "selective_state_update")


def test_speed(benchmark, turn):
    benchmark.extra_info.update(turn.facts)
    benchmark.pedantic(turn.call, rounds=turn.rounds, iterations=turn.iterations, warmup_rounds=turn.warmup)
