"""Speed of ``linear_scan`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("linear_scan",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
