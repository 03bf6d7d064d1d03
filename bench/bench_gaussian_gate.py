"""Speed of ``gaussian_gate`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("gaussian_gate",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
