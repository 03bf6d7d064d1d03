"""Speed of ``selective_state_update`` beside its rivals. See bench_selective_scan.py."""

OPS = ("selective_state_update",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
