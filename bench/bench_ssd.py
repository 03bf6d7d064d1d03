"""Speed of ``ssd`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("ssd",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
